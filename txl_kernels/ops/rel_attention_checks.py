"""Checks of the arguments of `rel_attention`, with one clear error each.

`op` is the public function that errors name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from txl_kernels._rel_attention_call import (
    UNLIMITED,
    Numbers,
    OptionalTensors,
    Options,
    Rules,
)
from txl_kernels.ops.checks import (
    FLOATING,
    check_broadcastable,
    check_dtype,
    check_flag,
    check_given,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    checked_window,
)


def check_tensors(
    op: str, q: Tensor, k: Tensor, v: Tensor, r: Tensor, optional: OptionalTensors
) -> int:
    """Queries, keys, values, positions and their biases. Returns Tk.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: of the wrong shape or on the wrong device.
    """
    check_dtype(op, "q", q, FLOATING)
    for name, tensor in (("k", k), ("v", v), ("r", r)):
        check_tensor(op, name, tensor)
    peers = {name: getattr(optional, name) for name in ("mem_k", "mem_v", "q_pos")}
    check_given(op, {"k": k, "v": v, "r": r, **peers}, (q.dtype,), q.device)
    biases = {"r_w_bias": optional.r_w_bias, "r_r_bias": optional.r_r_bias}
    check_given(op, biases, (q.dtype, torch.float32), q.device)

    check_shape(op, "q", q, ("B", "H", "Tq", "D"))
    B, H, Tq, D = q.shape
    check_shape(op, "k", k, (B, "Hk", "Ts", D))
    Hk, Ts = k.shape[1:3]
    if Hk != H and (Hk == 0 or H % Hk != 0):
        raise ValueError(f"{op}: q must have a multiple of k's {Hk} heads, got {H} heads")
    check_shape(op, "v", v, (B, Hk, Ts, "Dv"))
    if optional.q_pos is not None:
        check_shape(op, "q_pos", optional.q_pos, (B, H, Tq, "Dp"))
    Dp = D if optional.q_pos is None else optional.q_pos.shape[3]
    for name, size in (("q", D), ("v", v.shape[3]), ("q_pos", Dp)):
        if size < 1:
            raise ValueError(f"{op}: {name} must have a head size of at least 1, got 0")
    check_shape(op, "r", r, (B, H, "R", Dp), or_one=(0, 1))
    if r.shape[2] < 1:
        raise ValueError(f"{op}: r must have at least one row, got shape {list(r.shape)}")
    for (name, head_bias), size in zip(biases.items(), (D, Dp), strict=True):
        if head_bias is not None:
            check_shape(op, name, head_bias, (H, size))
    return Ts + _check_memory(op, k, v, optional.mem_k, optional.mem_v)


def _check_memory(op: str, k: Tensor, v: Tensor, mem_k: Tensor | None, mem_v: Tensor | None) -> int:
    """Returns Tm."""
    if mem_k is None and mem_v is None:
        return 0
    if mem_k is None or mem_v is None:
        missing = "mem_k" if mem_k is None else "mem_v"
        raise ValueError(f"{op}: mem_k and mem_v must be given together, got {missing}=None")
    B, Hk, _, D = k.shape
    check_shape(op, "mem_k", mem_k, (B, Hk, "Tm", D))
    check_shape(op, "mem_v", mem_v, (B, Hk, mem_k.shape[2], v.shape[3]))
    return mem_k.shape[2]


def check_keys(op: str, q: Tensor, Tk: int, optional: OptionalTensors, bias: Tensor | None) -> None:
    """The tensors that place queries, and that mask or bias keys.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: of the wrong shape or on the wrong device.
    """
    B, _, Tq, _ = q.shape
    positions = {name: getattr(optional, name) for name in ("q_start", "key_start", "key_lens")}
    check_given(op, positions, (torch.int32, torch.int64), q.device)
    if optional.q_start is not None:
        check_shape(op, "q_start", optional.q_start, (B,))
    for name in ("key_start", "key_lens"):
        ends = positions[name]
        if ends is not None and ends.shape != (B,) and ends.shape != (B, Tq):
            expected, actual = f"[{B}] or [{B}, {Tq}]", list(ends.shape)
            raise ValueError(f"{op}: {name} must have shape {expected}, got {actual}")
    for name, dense, dtypes in (
        ("mask", optional.mask, (torch.bool,)),
        ("bias", bias, (q.dtype, torch.float32)),
    ):
        if dense is not None:
            check_given(op, {name: dense}, dtypes, q.device)
            check_broadcastable(op, name, dense, (*q.shape[:3], Tk))


def checked_rules(op: str, q: Tensor, options: Options) -> Rules:
    """The rules about keys and rows of r. Causal attention is a window of 0 to the right.

    Raises:
        TypeError: of the wrong type.
        ValueError: out of range, or clamp without offset.
    """
    offset = options.offset
    check_flag(op, "clamp", options.clamp)
    check_flag(op, "causal", options.causal)
    if options.clamp and offset is None:
        raise ValueError(f"{op}: clamp=True needs an explicit offset, got offset=None")
    left, right = checked_window(op, options.window)
    return Rules(
        check_int(op, "offset", q.shape[2] - 1 if offset is None else offset),
        int(options.clamp),
        UNLIMITED if left is None else left,
        0 if options.causal else UNLIMITED if right is None else right,
        *_checked_chunk(op, options.chunk),
    )


def checked_numbers(op: str, q: Tensor, options: Options) -> Numbers:
    """The factors and the dropout probability.

    Raises:
        TypeError: of the wrong type.
        ValueError: out of range, NaN or infinite.
    """
    scale, pos_scale = options.scale, options.pos_scale
    scale = check_number(op, "scale", q.shape[3] ** -0.5 if scale is None else scale)
    pos_scale = scale if pos_scale is None else check_number(op, "pos_scale", pos_scale)
    softcap = _effective_softcap(check_number(op, "softcap", options.softcap, at_least=0), q.dtype)
    dropout_p = check_number(op, "dropout_p", options.dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    return Numbers(scale, pos_scale, softcap, dropout_p)


def _effective_softcap(softcap: float, dtype: torch.dtype) -> float:
    """A softcap that can be divided and multiplied by in the dtype of scores, of the same effect.

    Below 2^-100 every capped score counts as 0. Above 2^120 (2^1000 in float64) the softcap is off:
    it would change only scores within a factor of 100 of the largest number.
    """
    if not isinstance(softcap, float) or softcap == 0:  # symbolic, or off
        return softcap
    largest = 2.0**1000 if dtype == torch.float64 else 2.0**120
    return max(softcap, 2.0**-100) if softcap <= largest else 0.0


def _checked_chunk(op: str, chunk: Sequence[int] | None) -> tuple[int, int, int]:
    """(size, left, phase); a size of 0 without chunks."""
    if chunk is None:
        return 0, 0, 0
    if not isinstance(chunk, (tuple, list)) or len(chunk) not in (2, 3):
        form = "(size, left) or (size, left, phase)"
        raise ValueError(f"{op}: chunk must be {form}, got {chunk!r}")
    size, left, phase = (*chunk, 0)[:3]
    return (
        check_int(op, "chunk's size", size, at_least=1),
        check_int(op, "chunk's left", left, at_least=0),
        check_int(op, "chunk's phase", phase),
    )


def check_seed(op: str, q: Tensor, dropout_seed: Tensor | None) -> None:
    """Raises TypeError or ValueError unless it is one int64 on q's device, or None."""
    if dropout_seed is not None:
        check_given(op, {"dropout_seed": dropout_seed}, (torch.int64,), q.device)
        if dropout_seed.numel() != 1:
            shape = list(dropout_seed.shape)
            raise ValueError(f"{op}: dropout_seed must have one element, got shape {shape}")
