"""FLOP of every operator for `torch.utils.flop_counter`: 2 per multiply-add of matrix products.

Masks are ignored, as in torch's formulas for attention. The adaptive operators read no token here:
every token is counted in the head and in a tail of mean cost.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from txl_kernels._rel_attention_call import OptionalTensors

_MEM_K = OptionalTensors._fields.index("mem_k")
_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def register(*namespaces: Any) -> None:
    """Registers the formulas for `torch.ops.<name>`, at the latest when torch's are imported.

    torch's module imports Triton, so it is not imported here.
    """
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        _register(counter, namespaces)
    else:
        sys.meta_path.insert(0, _AfterImport(namespaces))


class _AfterImport(MetaPathFinder):
    """Registers the formulas once torch's counter has been imported."""

    def __init__(self, namespaces: Sequence[Any]) -> None:
        self._namespaces = namespaces
        self._searching = False

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        """The counter's own specification, whose execution ends with the registration."""
        if fullname != _COUNTER or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module, self._namespaces)
            sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(counter: ModuleType, namespaces: Sequence[Any]) -> None:
    for operators in namespaces:
        for operator, formula in (
            (operators.rel_attention_fwd, _rel_attention_fwd),
            (operators.rel_attention_bwd, _rel_attention_bwd),
            (operators.rel_shift_fwd, _no_products),
            (operators.rel_shift_bwd, _no_products),
            (operators.adaptive_nll_fwd, _adaptive_nll_fwd),
            (operators.adaptive_nll_bwd, _adaptive_nll_bwd),
            (operators.adaptive_loss_fwd, _adaptive_loss_fwd),
            (operators.adaptive_loss_bwd, _no_products),
            (operators.adaptive_embedding_fwd, _adaptive_embedding_fwd),
            (operators.adaptive_embedding_bwd, _adaptive_embedding_bwd),
            (operators.few_row_linear_fwd, _few_row_linear_fwd),
        ):
            counter.register_flop_formula(operator)(formula)


def _rel_attention_fwd(
    q: Shape, k: Shape, v: Shape, r: Shape, optional: Sequence[Shape], *_: Any, **__: Any
) -> int:
    """Content scores, position scores, and the sum of values."""
    return _pairs(q, k, optional) * (q[3] + r[3] + v[3])


def _rel_attention_bwd(
    dout: Shape,
    dlse: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    r: Shape,
    optional: Sequence[Shape],
    *_: Any,
    **__: Any,
) -> int:
    """Both scores again, their gradients for both factors, and two products with values."""
    return _pairs(q, k, optional) * (3 * (q[3] + r[3]) + 2 * v[3])


def _pairs(q: Shape, k: Shape, optional: Sequence[Shape]) -> int:
    """FLOP of one product per query and key: 2 · B · H · Tq · Tk."""
    mem_k = optional[_MEM_K]
    Tk = k[2] + (mem_k[2] if len(mem_k) == 4 else 0)
    return 2 * q[0] * q[1] * q[2] * Tk


def _adaptive_nll_fwd(
    hidden: Shape, target: Shape, clusters: Sequence[Shape], *_: Any, **__: Any
) -> int:
    return _softmax(hidden, clusters, [False] * (1 + len(clusters)))


def _adaptive_nll_bwd(
    dnll: Shape,
    hidden: Shape,
    target: Shape,
    clusters: Sequence[Shape],
    ignore_index: int,
    lse: Shape,
    needs_grad: Sequence[bool],
    **_: Any,
) -> int:
    """Projections and logits again, then gradients."""
    return _softmax(hidden, clusters, needs_grad)


def _adaptive_loss_fwd(
    hidden: Shape,
    target: Shape,
    clusters: Sequence[Shape],
    ignore_index: int,
    mean: bool,
    needs_grad: Sequence[bool],
    **_: Any,
) -> int:
    """Projections and logits, and gradients in the same pass."""
    return _softmax(hidden, clusters, needs_grad)


def _softmax(hidden: Shape, clusters: Sequence[Shape], needs_grad: Sequence[bool]) -> int:
    """Projections, logits and the requested gradients of every token: in the head and one tail."""
    costs = []
    for n in range(0, len(clusters), 3):
        projection, weight = clusters[n], clusters[n + 1]
        dprojection, dweight = (needs_grad[1 + n] and projection[0] > 0), needs_grad[2 + n]
        dx = needs_grad[0] or dprojection
        cost = _size(weight) * (1 + dx + dweight)
        if projection[0] > 0:
            cost += _size(projection) * (1 + needs_grad[0] + dprojection)
        costs.append(2 * hidden[0] * cost)
    head, *tails = costs
    return head + sum(tails) // max(len(tails), 1)


def _adaptive_embedding_fwd(
    tokens: Shape, tables: Sequence[Shape], projections: Sequence[Shape], *_: Any, **__: Any
) -> int:
    return _projections(tokens, projections, [1] * len(projections))


def _adaptive_embedding_bwd(
    dout: Shape,
    tokens: Shape,
    tables: Sequence[Shape],
    projections: Sequence[Shape],
    scale: float,
    sparse: bool,
    needs_grad: Sequence[bool],
    **_: Any,
) -> int:
    n = len(tables)
    products = [needs_grad[k] + needs_grad[n + k] for k in range(n)]
    return _projections(tokens, projections, products)


def _projections(tokens: Shape, projections: Sequence[Shape], products: Sequence[int]) -> int:
    """Products of every token with the projection of a cluster of mean cost."""
    total = sum(_size(x) * n for x, n in zip(projections, products, strict=True) if x[0] > 0)
    return 2 * math.prod(tokens) * total // len(projections)


def _few_row_linear_fwd(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * _size(weight)


def _size(matrix: Shape) -> int:
    return matrix[0] * matrix[1]


def _no_products(*_: Any, **__: Any) -> int:
    return 0
