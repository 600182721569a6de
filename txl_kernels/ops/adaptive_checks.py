"""Checks of the arguments of the adaptive ops, with one clear error each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from txl_kernels.backends.reference.adaptive_softmax import Cluster
from txl_kernels.ops.autocast import autocast_dtype, cast
from txl_kernels.ops.checks import (
    FLOATING,
    check_dtype,
    check_given,
    check_int,
    check_shape,
    check_tensor,
)
from txl_kernels.torch_private import assert_async, unwrapped


def checked_clusters(
    op: str,
    hidden: Tensor,
    head: Cluster,
    tails: Sequence[Sequence[Tensor | None]],
    cutoffs: Sequence[int],
) -> tuple[Tensor, Cluster, list[Cluster]]:
    """`hidden`, the head and the tails, under autocast in its dtype.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: shapes, devices, cutoffs and tails that do not match.
    """
    check_tensor(op, "hidden", hidden)
    lower = autocast_dtype(hidden.device)
    hidden = cast(hidden, lower)
    check_dtype(op, "hidden", hidden, FLOATING)
    check_shape(op, "hidden", hidden, ("N", "d"))
    check_tensor(op, "head_weight", head.weight)
    for k, tail in enumerate(tails):
        if not isinstance(tail, (tuple, list)) or len(tail) != 3:
            raise ValueError(f"{op}: tails[{k}] must be (projection, weight, bias), got {tail!r}")
        check_tensor(op, f"the weight of tails[{k}]", tail[1])
    head, *others = (
        Cluster(cast(projection, lower), cast(weight, lower), bias)
        for projection, weight, bias in (head, *tails)
    )
    _check_cluster(op, ("head_proj", "head_weight", "head_bias"), hidden, head)
    for k, tail in enumerate(others):
        names = [f"the {part} of tails[{k}]" for part in ("projection", "weight", "bias")]
        _check_cluster(op, names, hidden, tail)
    sizes = [head.weight.shape[0] - len(others), *(tail.weight.shape[0] for tail in others)]
    check_cutoffs(op, cutoffs, sizes)
    return hidden, head, others


def _check_cluster(op: str, names: Sequence[str], hidden: Tensor, cluster: Cluster) -> None:
    """`names` are those of projection, weight and bias in messages."""
    projection, weight, bias = cluster
    products = {names[0]: projection, names[1]: weight}
    check_given(op, products, (hidden.dtype,), hidden.device)
    check_given(op, {names[2]: bias}, (hidden.dtype, torch.float32), hidden.device)
    d = hidden.shape[1]
    if projection is not None:
        check_shape(op, names[0], projection, ("d_k", d))
        d = projection.shape[0]
    check_shape(op, names[1], weight, ("V_k", d))
    if bias is not None:
        check_shape(op, names[2], bias, (weight.shape[0],))


def check_cutoffs(op: str, cutoffs: Sequence[int], sizes: Sequence[int]) -> None:
    """Compares the cutoffs with `sizes`, the number of tokens in each cluster.

    Raises:
        TypeError, ValueError: cutoffs are not the first tokens of all clusters but the first.
    """
    if not isinstance(cutoffs, (tuple, list)):
        raise TypeError(f"{op}: cutoffs must be a sequence of integers, got {cutoffs!r}")
    given = [check_int(op, "every cutoff", cutoff) for cutoff in cutoffs]
    expected, first = [], 0
    for size in sizes:
        if size < 1:
            raise ValueError(f"{op}: every cluster must hold a token, got sizes {list(sizes)}")
        first = first + size  # not in place: torch.jit.trace counts sizes in tensors
        expected.append(first)
    if given != expected[:-1]:
        raise ValueError(
            f"{op}: cutoffs must be {expected[:-1]}, the first token of each tail according to the "
            f"shapes of the weights, got {given}"
        )


def check_tokens(
    op: str, name: str, tokens: Tensor, n_tokens: int, ignore_index: int | None = None
) -> None:
    """Every token is in [0, n_tokens) or `ignore_index`.

    In eager mode on the CPU a wrong token raises; on other devices and under `torch.compile` an
    assertion runs on the device, without synchronisation.

    Raises:
        IndexError: names the first token out of range.
    """
    if not torch.compiler.is_compiling():
        tokens = unwrapped(tokens)  # torch.vmap reads no value of a batched tensor
    wrong = (tokens < 0) | (tokens >= n_tokens)
    if ignore_index is not None:
        wrong = wrong & (tokens != ignore_index)
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        if wrong.any():
            raise IndexError(
                f"{op}: {name} must be in [0, {n_tokens}), got {int(tokens[wrong][0])}"
            )
    else:
        assert_async(~wrong.any(), f"{op}: {name} must be in [0, {n_tokens})")
