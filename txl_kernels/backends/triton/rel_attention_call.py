"""From a call of a `rel_attention` operator to the arguments that its Triton kernels share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from txl_kernels._rel_attention_call import RelAttentionCall, Rules

# Kernels are compiled again for each dtype, head size and set of given tensors, and for strides
# that are multiples of 16 or not, but not for these, which change from call to call.
UNSPECIALIZED = (
    "H",
    "Tq",
    "Tm",
    "Tk",
    "R",
    "offset",
    "left",
    "right",
    "chunk_size",
    "chunk_left",
    "chunk_phase",
    "scale",
    "sign",
    "softcap",
    "threshold",
    "dropout_scale",
)
_LONGEST_CHUNK = 2**40
# Within a block of rows, 128 at most, kernels multiply by strides in 32 bits.
_LONGEST_STRIDE = 2**24


def kernel_arguments(call: RelAttentionCall) -> dict[str, Any]:
    """Pointers, strides and numbers by the names that every kernel of the op gives them.

    An absent tensor and its strides are None, which makes the kernel one without it. Numbers are
    brought into ranges where 32-bit arithmetic cannot overflow, without changing what they mean.
    """
    optional, rules, numbers = call.optional, call.rules, call.numbers
    q, k, v, r = (near_rows(x) for x in call[:4])
    mem_k, mem_v = (None if x is None else near_rows(x) for x in optional[2:4])
    r_w_bias, r_r_bias, mask = optional.r_w_bias, optional.r_r_bias, optional.mask
    key_start, key_lens = optional.key_start, optional.key_lens
    H, Tq, D = q.shape[1:]
    Tm = 0 if mem_k is None else mem_k.shape[2]
    Tk, R = Tm + k.shape[2], r.shape[2]
    far = Tq + Tk  # no two of queries and keys are further apart
    chunk_size, chunk_left, chunk_phase = _normal_chunk(rules, Tq, Tk)
    scale, softcap, dropout_p = numbers.scale, numbers.softcap, numbers.dropout_p
    dropout = dropout_p > 0
    return {
        "p_q": q,
        "p_k": k,
        "p_v": v,
        "p_r": r,
        "p_r_w_bias": None if r_w_bias is None else r_w_bias.contiguous(),
        "p_r_r_bias": None if r_r_bias is None else r_r_bias.contiguous(),
        "p_mem_k": mem_k if Tm else None,
        "p_mem_v": mem_v if Tm else None,
        "p_key_start": None if key_start is None else key_start.contiguous(),
        "p_key_lens": None if key_lens is None else key_lens.contiguous(),
        "p_mask": None if mask is None else mask.view(torch.uint8),
        "p_seed": optional.dropout_seed if dropout else None,
        **strides("q", q, "bhi"),
        **strides("k", k, "bhj"),
        **strides("v", v, "bhj"),
        **strides("r", r, "bhm"),
        **strides("mem_k", mem_k if Tm else None, "bhj"),
        **strides("mem_v", mem_v if Tm else None, "bhj"),
        **strides("mask", mask, "bhij"),
        "H": H,
        "Tq": Tq,
        "Tm": Tm,
        "Tk": Tk,
        "R": R,
        "offset": min(max(rules.offset, -Tk), R + Tq),
        "left": min(rules.window_left, far),
        "right": min(rules.window_right, far),
        "chunk_size": chunk_size,
        "chunk_left": chunk_left,
        "chunk_phase": chunk_phase,
        # A scale that a GPU rounds to 0 would turn masked scores, -inf, into NaN. A sign of 0 makes
        # the products 0 instead.
        "scale": abs(scale) if query_sign(scale) else 1.0,
        "sign": query_sign(scale),
        "softcap": softcap if softcap > 0 else None,
        "threshold": _as_int32(int(dropout_p * 2**32)) if dropout else None,
        "dropout_scale": 1.0 / (1.0 - dropout_p) if dropout else None,
        "D": D,
        "DV": v.shape[3],
        "CLAMP": rules.clamp == 1,
    }


def query_sign(scale: float) -> float:
    """The sign of the scale, 0 if float32 arithmetic on a GPU rounds the scale to 0."""
    return 0.0 if abs(scale) < torch.finfo(torch.float32).tiny else math.copysign(1.0, scale)


def near_rows(tensor: Tensor) -> Tensor:
    """[B, H, T, D] itself, or a contiguous copy where its rows are too far apart."""
    return tensor if tensor.stride(2) <= _LONGEST_STRIDE else tensor.contiguous()


def strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int | None]:
    """`s_<name>_<axis>` in elements; 0 along an axis of size 1, which thereby broadcasts."""
    if tensor is None:
        return {f"s_{name}_{axis}": None for axis in axes}
    return {
        f"s_{name}_{axis}": tensor.stride(n) if tensor.shape[n] > 1 else 0
        for n, axis in enumerate(axes)
    }


def _normal_chunk(rules: Rules, Tq: int, Tk: int) -> tuple[int, int, int] | tuple[None, None, None]:
    """The same borders between positions -Tq and Tk from numbers that are small and above 0.

    With a phase that lifts every position above 0, division rounds down as a floor does.
    """
    size, left, phase = rules.chunk_size, rules.chunk_left, rules.chunk_phase
    if size == 0:
        return None, None, None
    phase %= size
    if size > _LONGEST_CHUNK:  # at most one border is near: the one before 0 or the one behind
        near_end = size - phase <= _LONGEST_CHUNK // 2
        phase = _LONGEST_CHUNK - (size - phase) if near_end else min(phase, _LONGEST_CHUNK // 2)
        size = _LONGEST_CHUNK
    phase += -(-Tq // size) * size
    return size, min(left, (Tq + Tk) // size + 1), phase


def _as_int32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
