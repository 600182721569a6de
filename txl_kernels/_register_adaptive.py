"""Fake kernels and autograd of the adaptive ops, once for all namespaces that implement them.

`clusters` holds three tensors per cluster, the head first: projection, weight, bias. An absent one
is an empty tensor. Gradients have the same order after the gradient of `hidden`; one that was not
requested is an empty tensor too. `needs_grad` has a flag for each. The native ops accept one more
flag where `is_one_table` is true: the gradients of the weights of all tails are then one tensor, at
the place of the first, and the rows before them are free for the shortlist (the most frequent
tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from txl_kernels._derivatives import (
    refuse_batched_gradients,
    refuse_second_derivative,
    register_autograd,
    register_vmap,
    without_derivative,
)
from txl_kernels._namespaces import NATIVE
from txl_kernels.torch_private import is_batched
from txl_kernels.transforms import inside_transform


def register(operators: Any) -> None:
    """Registers fake kernels and autograd of the ops in a namespace, `torch.ops.<name>`."""
    _register_nll(operators)
    _register_loss(operators)
    _register_embedding(operators)


def _register_nll(operators: Any) -> None:
    """nll [N] and, for backward, lse [2, 2, N]: log-sum-exp of the head and of the token's tail.

    Each in two parts, the largest logit and log Σ exp(logit - largest): where logits are large,
    their sum would round the second part away.
    """
    name = f"{operators.name}::adaptive_nll"
    fwd, bwd = f"{name}_fwd", f"{name}_bwd"

    def fake_fwd(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        N, dtype = hidden.shape[0], _work_dtype(hidden)
        return hidden.new_empty(N, dtype=dtype), hidden.new_empty(2, 2, N, dtype=dtype)

    def fake_bwd(
        _dnll: Tensor, hidden: Tensor, _target: Tensor, clusters: list[Tensor], *args: Any
    ) -> tuple[Tensor, list[Tensor]]:
        dhidden, *dclusters = _fake_grads([hidden, *clusters], args[-1])
        return dhidden, dclusters

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, target, clusters, ctx.ignore_index = inputs
        ctx.save_for_backward(hidden, target, output[1], *clusters)
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, dnll: Tensor, _dlse: Tensor | None) -> tuple[Any, ...]:
        hidden, target, lse, *clusters = ctx.saved_tensors
        needs_grad = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2]]
        if operators is NATIVE and is_one_table(clusters, needs_grad):
            needs_grad.append(True)
        call = (hidden, target, clusters, ctx.ignore_index, lse, needs_grad)
        dhidden, dclusters = operators.adaptive_nll_bwd(dnll, *call)
        grads = _apart([dhidden, *dclusters], needs_grad, [x.shape for x in clusters])
        dhidden, *dclusters = _requested(grads, needs_grad)
        return dhidden, None, dclusters, None

    torch.library.register_fake(fwd, fake_fwd)
    torch.library.register_fake(bwd, fake_bwd)
    register_autograd(fwd, backward, setup_context)
    refuse_second_derivative(bwd)
    refuse_batched_gradients(bwd)
    register_vmap(fwd, operators.adaptive_nll_fwd)
    register_vmap(bwd, operators.adaptive_nll_bwd)


def _register_loss(operators: Any) -> None:
    """The gradients, formed with the loss, are kept for backward.

    Backward multiplies them in place by dloss and returns them, once; under `torch.compile` it
    copies them. Those of float16 tensors are float32 until then, because their factor (a loss
    scale, say) decides whether float16 can hold them.
    """
    name = f"{operators.name}::adaptive_loss"
    fwd, bwd = f"{name}_fwd", f"{name}_bwd"

    def fake_fwd(
        hidden: Tensor, _target: Tensor, clusters: list[Tensor], *args: Any
    ) -> tuple[Tensor, list[Tensor]]:
        grads = _fake_grads([hidden, *clusters], args[-1])
        grads = [x.float() if x.dtype == torch.float16 else x for x in grads]
        return hidden.new_empty((), dtype=_work_dtype(hidden)), grads

    def fake_bwd(_dloss: Tensor, _grads: list[Tensor]) -> None:
        return None

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.needs_grad = inputs[-1]
        ctx.shapes = [x.shape for x in inputs[2]]
        ctx.dtypes = [x.dtype for x in (inputs[0], *inputs[2])]
        _, ctx.grads = output
        ctx.mark_non_differentiable(*ctx.grads)
        ctx.set_materialize_grads(False)  # else torch passes zeros as large as all gradients

    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "adaptive_loss: its gradients were returned by an earlier backward through this "
                "graph; call it again, or sum adaptive_nll, which can go backward many times"
            )
        grads, ctx.grads = ctx.grads, None
        is_eager = all(type(grad) is Tensor for grad in grads)
        if is_eager and not is_batched(dloss):
            operators.adaptive_loss_bwd(dloss.detach(), grads)
        else:  # a traced graph may not change its own outputs, and a batch of dloss needs copies
            grads = [grad * dloss for grad in grads]
        grads = list(grads)
        for n, dtype in enumerate(ctx.dtypes):  # one by one: frees each float32 gradient
            grads[n] = grads[n].to(dtype)
        grads = _apart(grads, ctx.needs_grad, ctx.shapes)
        grads = without_derivative("adaptive_loss", grads)
        dhidden, *dclusters = _requested(grads, ctx.needs_grad)
        return dhidden, None, dclusters, None, None, None

    torch.library.register_fake(fwd, fake_fwd)
    torch.library.register_fake(bwd, fake_bwd)
    register_autograd(fwd, backward, setup_context)
    register_vmap(fwd, operators.adaptive_loss_fwd)


def _register_embedding(operators: Any) -> None:
    """Dense gradients of tables, or with `sparse` those of the rows that tokens index.

    With `sparse`, row n of the gradient of table k, [N, d_k] or shorter, is the gradient of table
    row rows[k, n]. `rows` holds the distinct rows in ascending order and -1 after the last; the
    gradients there are 0. Without `sparse`, `rows` is empty.
    """
    name = f"{operators.name}::adaptive_embedding"
    fwd, bwd = f"{name}_fwd", f"{name}_bwd"

    def fake_fwd(
        tokens: Tensor, tables: list[Tensor], projections: list[Tensor], *_: Any
    ) -> Tensor:
        return tables[0].new_empty(*tokens.shape, _embedding_width(tables, projections))

    def fake_bwd(
        _dout: Tensor,
        tokens: Tensor,
        tables: list[Tensor],
        projections: list[Tensor],
        _scale: float,
        sparse: bool,
        needs_grad: list[bool],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        n, N = len(tables), tokens.numel()
        rows = tokens.new_empty((n, N) if sparse else (0,))
        like = tables
        if sparse:
            like = [table.new_empty(_fake_rows(operators, N), table.shape[1]) for table in tables]
        dtables = _fake_grads(like, needs_grad[:n])
        return rows, dtables, _fake_grads(projections, needs_grad[n:])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tokens, tables, projections, ctx.scale, ctx.sparse = inputs
        ctx.save_for_backward(tokens, *tables, *projections)

    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        tokens, *weights = ctx.saved_tensors
        n = len(weights) // 2
        tables, projections = weights[:n], weights[n:]
        needs_grad = [*ctx.needs_input_grad[1], *ctx.needs_input_grad[2]]
        call = (tokens, tables, projections, ctx.scale, ctx.sparse, needs_grad)
        rows, dtables, dprojections = operators.adaptive_embedding_bwd(dout, *call)
        dtables, dprojections = (
            _requested(dtables, needs_grad[:n]),
            _requested(dprojections, needs_grad[n:]),
        )
        if ctx.sparse:
            dtables = [
                None if values is None else _sparse_rows(index, values, table)
                for index, values, table in zip(rows, dtables, tables, strict=True)
            ]
        return None, dtables, dprojections, None, None

    torch.library.register_fake(fwd, fake_fwd)
    torch.library.register_fake(bwd, fake_bwd)
    register_autograd(fwd, backward, setup_context)
    refuse_second_derivative(bwd)
    refuse_batched_gradients(bwd)
    register_vmap(fwd, operators.adaptive_embedding_fwd)
    register_vmap(bwd, operators.adaptive_embedding_bwd)


def _sparse_rows(index: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """The sparse gradient of a table; where the number of rows is open, the host reads it."""
    n = len(values)
    if n == len(index):
        n = int((index >= 0).sum())
    return torch.sparse_coo_tensor(
        index[None, :n], values[:n], table.shape, is_coalesced=True, check_invariants=False
    )


def _fake_rows(operators: Any, N: int) -> Any:
    """The native backend returns as many rows as tokens index; a CUDA kernel always returns N."""
    return torch.library.get_ctx().new_dynamic_size() if operators is NATIVE else N


def is_present(x: Tensor) -> bool:
    """Whether a tensor of a list is given: a vector without elements stands for an absent one."""
    return x.dim() != 1 or x.numel() > 0


def _embedding_width(tables: Sequence[Tensor], projections: Sequence[Tensor]) -> int:
    return projections[0].shape[0] if is_present(projections[0]) else tables[0].shape[1]


def is_one_table(clusters: Sequence[Tensor], needs_grad: Sequence[bool]) -> bool:
    """Whether all tail weights need a gradient and are adjacent in memory, as rows of one table.

    False under a compiler and inside `torch.vmap`, whose tensors have no memory of their own.
    """
    weights = clusters[4::3]
    if torch.compiler.is_compiling() or inside_transform("vmap"):
        return False
    if not weights or not all(needs_grad[5::3]):
        return False
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in weights):
        return False
    memory, offset = weights[0].untyped_storage().data_ptr(), weights[0].storage_offset()
    for x in weights:
        same = x.untyped_storage().data_ptr() == memory and x.shape[1] == weights[0].shape[1]
        if not (same and x.is_contiguous() and x.storage_offset() == offset):
            return False
        offset += x.numel()
    return True


def _apart(
    grads: Sequence[Tensor], needs_grad: Sequence[bool], shapes: Sequence[torch.Size]
) -> list[Tensor]:
    """Splits gradients of tails that are one table into those of each tail."""
    grads = list(grads)
    if len(needs_grad) > len(grads):
        n_rows = [shape[0] for shape in shapes[4::3]]
        room = len(grads[5]) - sum(n_rows)
        grads[5::3] = torch.split(grads[5], [room, *n_rows])[1:]
    return grads


def _fake_grads(inputs: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    grads = [
        x.new_empty(x.shape) if needed else x.new_empty(0)
        for x, needed in zip(inputs, needs_grad, strict=False)
    ]
    if len(needs_grad) > len(grads):
        n_shortlist = inputs[2].shape[0] - len(grads[5::3])
        n_rows = n_shortlist + sum(len(x) for x in grads[5::3])
        grads[5::3] = [x.new_empty(0) for x in grads[5::3]]
        grads[5] = inputs[5].new_empty(n_rows, inputs[5].shape[1])
    return grads


def _requested(grads: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs_grad, strict=False)]


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
