"""The checks that hold a backend's adaptive softmax and embedding to the error budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from txl_kernels.ops.adaptive_embedding import adaptive_embedding
from txl_kernels.ops.adaptive_softmax import adaptive_loss, adaptive_nll
from txl_kernels.testing.adaptive_softmax_cases import Cluster, Inputs
from txl_kernels.testing.budget import check_budget

_Within = Callable[[], contextlib.AbstractContextManager[Any]]
_EMBEDDING_SCALE = 2.5


def check_adaptive_softmax(
    op: str,
    inputs: Inputs,
    cutoffs: Sequence[int],
    backend: str,
    *,
    runs: int = 1,
    within: _Within = contextlib.nullcontext,
) -> None:
    """Asserts that "adaptive_loss" or "adaptive_nll" and all gradients are within the budget.

    `adaptive_loss` is the sum over tokens; the loss of `adaptive_nll` gets random gradients. The
    arguments `runs` and `within` are those of `check_rel_attention`.
    """
    hidden, target, (projection, weight, bias), tails = inputs
    dtype, dout, largest = hidden.dtype, None, 1.0
    if op == "adaptive_nll":
        dout = torch.randn(hidden.shape[0], generator=torch.Generator().manual_seed(5))
        dout, largest = dout.to(hidden.device), float(dout.abs().max())

    def kernel(_: Inputs) -> Tensor:
        args = (hidden, target, weight, tails)
        head: dict[str, Any] = {"cutoffs": cutoffs, "head_bias": bias, "head_proj": projection}
        if op == "adaptive_nll":
            return adaptive_nll(*args, **head, backend=backend)
        return adaptive_loss(*args, **head, reduction="sum", backend=backend)

    def plain(inputs: Inputs) -> Tensor:
        nll = plain_nll(inputs)
        return nll if op == "adaptive_nll" else nll.double().sum()

    def results(inputs: Inputs, loss: Callable[[Inputs], Tensor]) -> list[Tensor]:
        value = loss(inputs)
        gradient = None if dout is None else dout.to(value.dtype)
        return [value.detach(), *torch.autograd.grad(value, _leaves(inputs), gradient)]

    what = f"{op} {backend} {dtype}"
    actual = _repeated(lambda: results(inputs, kernel), runs, within, what)
    exact = _leaves_of(inputs, torch.float64)
    due, eager = results(exact, plain), results(inputs, plain)
    magnitude = largest * max(float(x.detach().abs().max()) for x in _leaves(exact))
    for n, tensors in enumerate(zip(actual, due, eager, strict=True)):
        gradient: dict[str, Any] = {"magnitude": magnitude, "is_sum": True} if n else {}
        check_budget(f"{what}: tensor {n}", *tensors, dtype=dtype, **gradient)


def check_adaptive_embedding(
    inputs: Inputs,
    cutoffs: Sequence[int],
    backend: str,
    *,
    runs: int = 1,
    within: _Within = contextlib.nullcontext,
) -> None:
    """The same for `adaptive_embedding`: the weights are its tables, the targets its tokens."""
    hidden, target, head, tails = inputs
    dtype, tokens = hidden.dtype, target.clamp(min=0)
    weight = head[1][: head[1].shape[0] - len(tails)]
    tables = [x.detach() for x in (weight, *(tail[1] for tail in tails))]
    given = [None if x is None else x.detach().mT.contiguous() for x, *_ in (head, *tails)]
    dout = hidden.detach()

    def results(dtype: torch.dtype, embed: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tables]
        projections = [None if x is None else x.detach().to(dtype).requires_grad_() for x in given]
        out = embed(leaves, projections)
        all_leaves = [*leaves, *(x for x in projections if x is not None)]
        return [out.detach(), *torch.autograd.grad(out, all_leaves, dout.to(out.dtype))]

    def kernel(tables: list[Tensor], projections: list[Tensor | None]) -> Tensor:
        return adaptive_embedding(
            tokens, tables, projections, cutoffs, _EMBEDDING_SCALE, backend=backend
        )

    def plain(tables: list[Tensor], projections: list[Tensor | None]) -> Tensor:
        pairs = zip(tables, projections, strict=True)
        whole = torch.cat([x if p is None else x @ p.mT for x, p in pairs])
        return _EMBEDDING_SCALE * whole[tokens]

    what = f"adaptive_embedding {backend} {dtype}"
    actual = _repeated(lambda: results(dtype, kernel), runs, within, what)
    due, eager = results(torch.float64, plain), results(dtype, plain)
    largest = max(float(x.abs().max()) for x in (*tables, *given) if x is not None)
    magnitude = _EMBEDDING_SCALE * float(dout.abs().max()) * max(largest, 1.0)
    for n, tensors in enumerate(zip(actual, due, eager, strict=True)):
        gradient: dict[str, Any] = {"magnitude": magnitude, "is_sum": True} if n else {}
        check_budget(f"{what}: tensor {n}", *tensors, dtype=dtype, **gradient)


def plain_nll(inputs: Inputs) -> Tensor:
    """Each token's loss in the dtype of `inputs`, every intermediate rounded; 0 where ignored.

    Each tail is computed for its own tokens, so that real vocabularies fit.
    """
    hidden, target, head, tails = inputs
    c0 = head[1].shape[0] - len(tails)
    column, nll = target.clamp(0, c0 - 1), hidden.new_zeros(hidden.shape[0])
    first = c0
    for k, tail in enumerate(tails):
        end = first + tail[1].shape[0]
        rows = ((target >= first) & (target < end)).nonzero()[:, 0]
        column = column.index_fill(0, rows, c0 + k)
        picked = _log_probs(hidden[rows], tail).gather(1, target[rows, None] - first)[:, 0]
        nll, first = nll.index_add(0, rows, -picked), end
    nll = nll - _log_probs(hidden, head).gather(1, column[:, None])[:, 0]
    return nll.masked_fill(target < 0, 0.0)


def _log_probs(hidden: Tensor, cluster: Cluster) -> Tensor:
    projection, weight, bias = cluster
    logits = (hidden if projection is None else hidden @ projection.mT) @ weight.mT
    return (logits if bias is None else logits + bias).log_softmax(1)


def _repeated(
    call: Callable[[], list[Tensor]], runs: int, within: _Within, what: str
) -> list[Tensor]:
    """The results of the first run; asserts that the others have the same bits."""
    with within():
        first = call()
        for _ in range(runs - 1):
            for n, (x, y) in enumerate(zip(first, call(), strict=True)):
                assert torch.equal(x, y), f"{what}: tensor {n} has other bits in a second run"
    return first


def _leaves_of(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values as leaves of their own in `dtype`."""

    def leaf(x: Any) -> Any:
        return None if x is None else x.detach().to(dtype).requires_grad_()

    hidden, target, (projection, weight, bias), tails = inputs
    moved = [(leaf(p), leaf(w), leaf(b)) for p, w, b in tails]
    return leaf(hidden), target, (leaf(projection), leaf(weight), leaf(bias)), moved


def _leaves(inputs: Inputs) -> list[Tensor]:
    hidden, _, head, tails = inputs
    tensors = [hidden, *head, *(x for tail in tails for x in tail)]
    return [x for x in tensors if x is not None]
