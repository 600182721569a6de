"""What `rel_attention` demands of its arguments, one clear error each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from txl_kernels.ops.checks import (
    FLOATING,
    check_broadcastable,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_floating,
    check_int,
    check_number,
    check_shape,
    check_tensor,
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
    key_start: Tensor | None,
    key_lens: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Types, dtypes, devices and shapes of every tensor but the dropout seed.

    Raises:
        TypeError: not a tensor, or of another dtype than q's where q's is due.
        ValueError: of another shape or on another device than due.
    """
    check_dtype(OP, "q", q, FLOATING)
    peers = {"k": k, "v": v, "r": r, "mem_k": mem_k, "mem_v": mem_v, "q_pos": q_pos}
    for name in ("k", "v", "r"):
        check_tensor(OP, name, peers[name])
    check_floating(OP, peers, (q.dtype,), q.device)
    added = {"r_w_bias": r_w_bias, "r_r_bias": r_r_bias, "bias": bias}
    check_floating(OP, added, (q.dtype, torch.float32), q.device)

    check_shape(OP, "q", q, ("B", "H", "Tq", "D"))
    B, H, Tq, D = q.shape
    check_shape(OP, "k", k, (B, H, "Ts", D))
    Ts = k.shape[2]
    check_shape(OP, "v", v, (B, H, Ts, "Dv"))
    Dv = v.shape[3]
    if D < 1 or Dv < 1:
        raise ValueError(f"{OP}: q and v must have head sizes of at least 1, got {D} and {Dv}")
    if (mem_k is None) != (mem_v is None):
        missing = "mem_k" if mem_k is None else "mem_v"
        raise ValueError(f"{OP}: mem_k and mem_v must be given together, got {missing}=None")
    Tk = Ts
    if mem_k is not None and mem_v is not None:
        check_shape(OP, "mem_k", mem_k, (B, H, "Tm", D))
        check_shape(OP, "mem_v", mem_v, (B, H, mem_k.shape[2], Dv))
        Tk = mem_k.shape[2] + Ts
    if q_pos is not None:
        check_shape(OP, "q_pos", q_pos, (B, H, Tq, "Dp"))
    Dp = D if q_pos is None else q_pos.shape[3]
    check_shape(OP, "r", r, (B, H, "R", Dp), or_one=(0, 1))
    if r.shape[2] < 1:
        raise ValueError(f"{OP}: r must have at least one row, got shape {list(r.shape)}")
    if r_w_bias is not None:
        check_shape(OP, "r_w_bias", r_w_bias, (H, D))
    if r_r_bias is not None:
        check_shape(OP, "r_r_bias", r_r_bias, (H, Dp))
    for name, lengths in (("key_start", key_start), ("key_lens", key_lens)):
        if lengths is not None:
            check_tensor(OP, name, lengths)
            check_dtype(OP, name, lengths, (torch.int32, torch.int64))
            check_device(OP, name, lengths, q.device)
            check_shape(OP, name, lengths, (B,))
    if mask is not None:
        check_tensor(OP, "mask", mask)
        check_dtype(OP, "mask", mask, (torch.bool,))
        check_device(OP, "mask", mask, q.device)
        check_broadcastable(OP, "mask", mask, (B, H, Tq, Tk))
    if bias is not None:
        check_broadcastable(OP, "bias", bias, (B, H, Tq, Tk))


def check_options(
    q: Tensor,
    offset: int | None,
    clamp: bool,
    causal: bool,
    window: Sequence[int | None] | None,
    chunk: Sequence[int] | None,
    scale: float | None,
    softcap: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    dead_rows: str,
) -> None:
    """Types and ranges of the numbers, and the dropout seed.

    Raises:
        TypeError: of another type than due.
        ValueError: out of range, or clamp without offset.
    """
    check_flag(OP, "clamp", clamp)
    check_flag(OP, "causal", causal)
    if offset is not None:
        check_int(OP, "offset", offset)
    elif clamp:
        raise ValueError(f"{OP}: clamp=True needs an explicit offset, got offset=None")
    if window is not None:
        _check_length("window", window, (2,), "(left, right)")
        for name, side in zip(("left", "right"), window, strict=True):
            if side is not None:
                check_int(OP, f"window's {name}", side, at_least=0)
    if chunk is not None:
        _check_length("chunk", chunk, (2, 3), "(size, left) or (size, left, phase)")
        check_int(OP, "chunk's size", chunk[0], at_least=1)
        check_int(OP, "chunk's left", chunk[1], at_least=0)
        if len(chunk) == 3:
            check_int(OP, "chunk's phase", chunk[2])
    if scale is not None:
        check_number(OP, "scale", scale)
    check_number(OP, "softcap", softcap)
    if softcap < 0:
        raise ValueError(f"{OP}: softcap must be at least 0, got {softcap}")
    check_number(OP, "dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{OP}: dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_seed is not None:
        check_tensor(OP, "dropout_seed", dropout_seed)
        check_dtype(OP, "dropout_seed", dropout_seed, (torch.int64,))
        check_device(OP, "dropout_seed", dropout_seed, q.device)
        if dropout_seed.numel() != 1:
            raise ValueError(
                f"{OP}: dropout_seed must have one element, got shape {list(dropout_seed.shape)}"
            )
    check_choice(OP, "dead_rows", dead_rows, ("zero", "uniform"))


def _check_length(name: str, value: object, due: tuple[int, ...], form: str) -> None:
    if not isinstance(value, (tuple, list)) or len(value) not in due:
        raise ValueError(f"{OP}: {name} must be {form}, got {value!r}")
