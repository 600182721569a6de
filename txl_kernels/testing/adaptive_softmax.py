"""Checks that the adaptive softmax and embedding of a backend are within the error budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from txl_kernels.testing.adaptive_softmax_cases import Inputs
from txl_kernels.testing.comparison import call, check_results, random_like, repeated

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
    arguments = softmax_arguments(op, inputs)
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    dout = torch.ones((), dtype=dtype, device=inputs[0].device)
    if op == "adaptive_nll":
        dout = random_like(inputs[0].new_empty(inputs[0].shape[0], dtype=dtype))
    label = f"{op} {list(cutoffs)} {backend} {inputs[0].dtype}"
    _check(label, op, arguments, backend, dout, runs, within)


def check_adaptive_embedding(
    inputs: Inputs,
    cutoffs: Sequence[int],
    backend: str,
    *,
    runs: int = 1,
    within: _Within = contextlib.nullcontext,
) -> None:
    """The same for `adaptive_embedding`: the weights are its tables, the targets its tokens."""
    arguments = embedding_arguments(inputs, _EMBEDDING_SCALE)
    op, dout = "adaptive_embedding", inputs[0].detach()
    label = f"{op} {list(cutoffs)} {backend} {dout.dtype}"
    _check(label, op, arguments, backend, dout, runs, within)


def _check(
    label: str,
    op: str,
    arguments: list[Any],
    backend: str,
    dout: Tensor,
    runs: int,
    within: _Within,
) -> None:
    with within():
        actual = repeated(label, op, arguments, lambda x: call(op, backend, x), [dout] * runs)
    check_results(label, op, arguments, actual, dout)


def softmax_arguments(op: str, inputs: Inputs) -> list[Any]:
    """The operator's arguments; `adaptive_loss` sums."""
    hidden, target, head, tails = inputs
    absent = hidden.detach().new_empty(0)
    flat = [absent if x is None else x for cluster in (head, *tails) for x in cluster]
    arguments = [hidden, target, flat, -100]
    if op == "adaptive_loss":
        arguments += [False, [x.requires_grad for x in (hidden, *flat)]]
    return arguments


def embedding_arguments(inputs: Inputs, scale: float) -> list[Any]:
    """The operator's arguments with the weights as tables and the targets as tokens."""
    hidden, target, head, tails = inputs
    shortlist = head[1][: head[1].shape[0] - len(tails)]
    absent = hidden.detach().new_empty(0)
    tables, projections = [], []
    for projection, table in ((head[0], shortlist), *(tail[:2] for tail in tails)):
        tables.append(table.detach().requires_grad_())
        turned = None if projection is None else projection.detach().mT.contiguous()
        projections.append(absent if turned is None else turned.requires_grad_())
    return [target.clamp(min=0), tables, projections, scale, False]
