"""The adaptive softmax and embedding against float64, on any device: results and all gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from txl_kernels import adaptive_embedding, adaptive_loss, adaptive_nll
from txl_kernels.testing import AdaptiveSoftmaxCase, check_budget

Cluster = tuple[Tensor | None, ...]
SCALE = 2.5  # of the embedding


def check_adaptive(
    case: AdaptiveSoftmaxCase, op: str, backend: str, dtype: torch.dtype, device: str
) -> None:
    """Asserts that loss and gradients of a backend are within the error budget."""
    inputs = _leaves_on(case.inputs(dtype), device, dtype)
    exact = _leaves_on(inputs, device, torch.float64)
    weight = torch.ones(case.N, device=device)
    if op == "adaptive_nll":
        weight = torch.randn(case.N, generator=torch.Generator().manual_seed(5)).to(device)
        actual = case.call(adaptive_nll, inputs, backend=backend) @ weight
    else:
        actual = case.call(adaptive_loss, inputs, reduction="sum", backend=backend)
    plain = _plain_nll(inputs) @ weight.to(dtype)
    due = _plain_nll(exact) @ weight.double()
    largest = float(weight.abs().max())
    check_budget(f"{case} {op}", actual, due, plain, dtype=dtype, magnitude=largest * case.N * 10)
    grads = [
        torch.autograd.grad(value, _leaves(x))
        for value, x in ((actual, inputs), (due, exact), (plain, inputs))
    ]
    magnitude = largest * max(float(x.detach().abs().max()) for x in _leaves(exact))
    for n, tensors in enumerate(zip(*grads, strict=True)):
        check_budget(
            f"{case} {op} gradient {n}", *tensors, dtype=dtype, magnitude=magnitude, is_sum=True
        )


def check_embedding(
    case: AdaptiveSoftmaxCase, backend: str, dtype: torch.dtype, device: str
) -> None:
    """The same of `adaptive_embedding`, its tables the case's weights, its tokens the targets."""
    inputs = _leaves_on(case.inputs(dtype), device, dtype)
    exact = _leaves_on(inputs, device, torch.float64)
    dout = torch.randn(case.N, case.d, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    results = []
    for x, name in ((inputs, backend), (exact, None), (inputs, None)):
        tables, projections = _tables(case, x)
        leaves = [leaf for leaf in (*tables, *projections) if leaf is not None]
        tokens = x[1].clamp(min=0)
        if name is None:
            out = SCALE * torch.cat(
                [t if p is None else t @ p.T for t, p in zip(tables, projections, strict=True)]
            ).index_select(0, tokens)
        else:
            out = adaptive_embedding(tokens, tables, projections, case.cutoffs, SCALE, backend=name)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))])
    largest = max(float(x.detach().abs().max()) for x in _leaves(exact))
    magnitude = SCALE * float(dout.abs().max()) * max(largest, 1.0)
    for n, (actual, due, plain) in enumerate(zip(*results, strict=True)):
        is_gradient = {"magnitude": magnitude, "is_sum": True} if n else {}
        check_budget(f"{case} embedding {n}", actual, due, plain, dtype=dtype, **is_gradient)


def _tables(case: AdaptiveSoftmaxCase, inputs: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """The clusters' tables, the head's without its cluster columns, and projections [d, d_k]."""
    _hidden, _target, head, tails = inputs
    clusters = [(head[0], head[1][: head[1].shape[0] - len(tails)]), *(x[:2] for x in tails)]
    tables = [weight.detach().requires_grad_() for _, weight in clusters]
    projections = [
        None if p is None else p.detach().T.contiguous().requires_grad_() for p, _ in clusters
    ]
    return tables, projections


def _plain_nll(inputs: Any) -> Tensor:
    """The formula in one go, every intermediate in the inputs' own dtype; 0 where ignored."""
    hidden, target, head, tails = inputs

    def log_softmax(cluster: Cluster) -> Tensor:
        projection, weight, bias = cluster
        assert weight is not None
        logits = (hidden if projection is None else hidden @ projection.T) @ weight.T
        return (logits if bias is None else logits + bias).log_softmax(1)

    first = log_softmax(head)
    c0 = first.shape[1] - len(tails)
    parts = [log_softmax(tail) + first[:, c0 + k, None] for k, tail in enumerate(tails)]
    picked = torch.cat([first[:, :c0], *parts], 1).gather(1, target.clamp(min=0)[:, None])
    return -picked[:, 0].masked_fill(target < 0, 0.0)


def _leaves_on(inputs: Any, device: str, dtype: torch.dtype) -> Any:
    """The same values as leaves of their own."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(device, dtype).requires_grad_()

    hidden, target, head, tails = inputs
    moved = [tuple(map(leaf, tail)) for tail in tails]
    return leaf(hidden), target.to(device), tuple(map(leaf, head)), moved


def _leaves(inputs: Any) -> list[Tensor]:
    hidden, _target, head, tails = inputs
    tensors = [hidden, *head, *(x for tail in tails for x in tail)]
    return [x for x in tensors if x is not None]
