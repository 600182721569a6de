"""Checks of the arguments of `rel_attention`, with one clear error each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from txl_kernels.ops.checks import (
    FLOATING,
    check_broadcastable,
    check_choice,
    check_dtype,
    check_flag,
    check_given,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    checked_window,
)

OP = "rel_attention"


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    r_w_bias: Tensor | None,
    r_r_bias: Tensor | None,
    mem_k: Tensor | None,
    mem_v: Tensor | None,
    q_pos: Tensor | None,
) -> int:
    """Queries, keys, values, positions and their biases. Returns Tk.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: of the wrong shape or on the wrong device.
    """
    check_dtype(OP, "q", q, FLOATING)
    for name, tensor in (("k", k), ("v", v), ("r", r)):
        check_tensor(OP, name, tensor)
    peers = {"k": k, "v": v, "r": r, "mem_k": mem_k, "mem_v": mem_v, "q_pos": q_pos}
    check_given(OP, peers, (q.dtype,), q.device)
    biases = {"r_w_bias": r_w_bias, "r_r_bias": r_r_bias}
    check_given(OP, biases, (q.dtype, torch.float32), q.device)

    check_shape(OP, "q", q, ("B", "H", "Tq", "D"))
    B, H, Tq, D = q.shape
    check_shape(OP, "k", k, (B, H, "Ts", D))
    check_shape(OP, "v", v, (B, H, k.shape[2], "Dv"))
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[3] < 1:
            raise ValueError(f"{OP}: {name} must have a head size of at least 1, got 0")
    if q_pos is not None:
        check_shape(OP, "q_pos", q_pos, (B, H, Tq, "Dp"))
    Dp = D if q_pos is None else q_pos.shape[3]
    check_shape(OP, "r", r, (B, H, "R", Dp), or_one=(0, 1))
    if r.shape[2] < 1:
        raise ValueError(f"{OP}: r must have at least one row, got shape {list(r.shape)}")
    for name, head_bias, size in (("r_w_bias", r_w_bias, D), ("r_r_bias", r_r_bias, Dp)):
        if head_bias is not None:
            check_shape(OP, name, head_bias, (H, size))
    return k.shape[2] + _check_memory(k, v, mem_k, mem_v)


def _check_memory(k: Tensor, v: Tensor, mem_k: Tensor | None, mem_v: Tensor | None) -> int:
    """Returns Tm."""
    if mem_k is None and mem_v is None:
        return 0
    if mem_k is None or mem_v is None:
        missing = "mem_k" if mem_k is None else "mem_v"
        raise ValueError(f"{OP}: mem_k and mem_v must be given together, got {missing}=None")
    B, H, _, D = k.shape
    check_shape(OP, "mem_k", mem_k, (B, H, "Tm", D))
    check_shape(OP, "mem_v", mem_v, (B, H, mem_k.shape[2], v.shape[3]))
    return mem_k.shape[2]


def check_keys(
    q: Tensor,
    Tk: int,
    key_start: Tensor | None,
    key_lens: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> None:
    """The tensors that mask or bias keys.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: of the wrong shape or on the wrong device.
    """
    lengths = {"key_start": key_start, "key_lens": key_lens}
    check_given(OP, lengths, (torch.int32, torch.int64), q.device)
    for name, length in lengths.items():
        if length is not None:
            check_shape(OP, name, length, (q.shape[0],))
    for name, dense, dtypes in (
        ("mask", mask, (torch.bool,)),
        ("bias", bias, (q.dtype, torch.float32)),
    ):
        if dense is not None:
            check_given(OP, {name: dense}, dtypes, q.device)
            check_broadcastable(OP, name, dense, (*q.shape[:3], Tk))


def checked_options(
    q: Tensor,
    offset: int | None,
    clamp: bool,
    causal: bool,
    window: Sequence[int | None] | None,
    chunk: Sequence[int] | None,
    scale: float | None,
    softcap: float,
    dead_rows: str,
) -> dict[str, Any]:
    """The options that are not tensors, by their names in the operator's schema.

    Raises:
        TypeError: of the wrong type.
        ValueError: out of range, or clamp without offset.
    """
    check_flag(OP, "clamp", clamp)
    check_flag(OP, "causal", causal)
    if clamp and offset is None:
        raise ValueError(f"{OP}: clamp=True needs an explicit offset, got offset=None")
    window_left, window_right = checked_window(OP, window)
    check_choice(OP, "dead_rows", dead_rows, ("zero", "uniform"))
    return {
        "offset": check_int(OP, "offset", q.shape[2] - 1 if offset is None else offset),
        "clamp": clamp,
        "causal": causal,
        "window_left": window_left,
        "window_right": window_right,
        "chunk": _checked_chunk(chunk),
        "scale": check_number(OP, "scale", q.shape[3] ** -0.5 if scale is None else scale),
        "softcap": _effective_softcap(check_number(OP, "softcap", softcap, at_least=0), q.dtype),
        "dead_uniform": dead_rows == "uniform",
    }


def _effective_softcap(softcap: float, dtype: torch.dtype) -> float:
    """A softcap that can be divided and multiplied by in the dtype of scores, of the same effect.

    Below 2^-100 every capped score counts as 0. Above 2^120 (2^1000 in float64) the softcap is off:
    it would change only scores within a factor of 100 of the largest number.
    """
    if not isinstance(softcap, float) or softcap == 0:  # symbolic, or off
        return softcap
    largest = 2.0**1000 if dtype == torch.float64 else 2.0**120
    return max(softcap, 2.0**-100) if softcap <= largest else 0.0


def _checked_chunk(chunk: Sequence[int] | None) -> tuple[int, ...]:
    """(size, left, phase), or () without chunks."""
    if chunk is None:
        return ()
    if not isinstance(chunk, (tuple, list)) or len(chunk) not in (2, 3):
        form = "(size, left) or (size, left, phase)"
        raise ValueError(f"{OP}: chunk must be {form}, got {chunk!r}")
    size, left, phase = (*chunk, 0)[:3]
    return (
        check_int(OP, "chunk's size", size, at_least=1),
        check_int(OP, "chunk's left", left, at_least=0),
        check_int(OP, "chunk's phase", phase),
    )


def checked_dropout(q: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> float:
    """Returns `dropout_p`. Raises TypeError and ValueError as the other checks do."""
    dropout_p = check_number(OP, "dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{OP}: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_seed is not None:
        check_given(OP, {"dropout_seed": dropout_seed}, (torch.int64,), q.device)
        if dropout_seed.numel() != 1:
            shape = list(dropout_seed.shape)
            raise ValueError(f"{OP}: dropout_seed must have one element, got shape {shape}")
    return dropout_p
