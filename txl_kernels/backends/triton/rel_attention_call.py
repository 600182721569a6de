"""From a call of a `rel_attention` operator to the arguments that its Triton kernels share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from txl_kernels._rel_attention_call import RelAttentionCall, Rules
from txl_kernels.backends.triton import rel_attention_ranges
from txl_kernels.backends.triton.rel_attention_config import block_size

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
    "content_factor",
    "position_factor",
    "softcap",
    "threshold",
    "dropout_scale",
)
# With q_start: values beyond ±2³¹ act as ±2³¹.
_FURTHEST_POSITION = 2**31
_FURTHEST = 2**40
_LONGEST_CHUNK = 2**40
# Within a block of rows, 128 at most, kernels multiply by strides in 32 bits.
_LONGEST_STRIDE = 2**24


def kernel_arguments(call: RelAttentionCall) -> dict[str, Any]:
    """Pointers, strides and numbers by the names that every kernel of the op gives them.

    An absent tensor and its strides are None, which makes the kernel one without it. Numbers are
    brought into ranges where arithmetic cannot overflow, without changing what they mean. Launches
    the kernel that computes the tables of ranges per query, if there are any.
    """
    optional, rules, numbers = call.optional, call.rules, call.numbers
    q, k, v, r = (near_rows(x) for x in call[:4])
    mem_k, mem_v, q_pos = (None if x is None else near_rows(x) for x in optional[2:5])
    B, H, Tq, D = q.shape
    DV, R, DP = v.shape[3], *r.shape[2:]
    Tm = 0 if mem_k is None else mem_k.shape[2]
    Tk = Tm + k.shape[2]
    key_start, first_keys = _of_row_or_query(optional.key_start, Tq)
    key_lens, last_keys = _of_row_or_query(optional.key_lens, Tq)
    query_ranges, tile_ranges = rel_attention_ranges.query_ranges(first_keys, last_keys, B, Tq, Tk)
    # Without q_start no two of queries and keys are further apart than `far`.
    far = Tq + Tk if optional.q_start is None else _FURTHEST
    lowest, highest = (-Tk, R + Tq) if optional.q_start is None else (-far, far)
    left, right = min(rules.window_left, far), min(rules.window_right, far)
    chunk_size, chunk_left, chunk_phase = _normal_chunk(rules, min(far, _FURTHEST_POSITION) + Tq)
    scale, content_factor, position_factor = score_factors(numbers.scale, numbers.pos_scale)
    dropout = numbers.dropout_p > 0
    return {
        "p_q": q,
        "p_q_pos": q_pos,
        "p_k": k,
        "p_v": v,
        "p_r": r,
        "p_r_w_bias": _contiguous(optional.r_w_bias),
        "p_r_r_bias": _contiguous(optional.r_r_bias),
        "p_mem_k": mem_k if Tm else None,
        "p_mem_v": mem_v if Tm else None,
        "p_q_start": _contiguous(optional.q_start),
        "p_key_start": key_start,
        "p_key_lens": key_lens,
        "p_query_ranges": query_ranges,
        "p_tile_ranges": tile_ranges,
        "p_mask": None if optional.mask is None else optional.mask.view(torch.uint8),
        "p_seed": optional.dropout_seed if dropout else None,
        **strides("q", q, "bhi"),
        **strides("q_pos", q_pos, "bhi"),
        **strides("k", k, "bhj"),
        **strides("v", v, "bhj"),
        **strides("r", r, "bhm"),
        **strides("mem_k", mem_k if Tm else None, "bhj"),
        **strides("mem_v", mem_v if Tm else None, "bhj"),
        **strides("mask", optional.mask, "bhij"),
        "H": H,
        "Tq": Tq,
        "Tm": Tm,
        "Tk": Tk,
        "R": R,
        "offset": min(max(rules.offset, lowest), highest),
        "left": left,
        "right": right,
        "chunk_size": chunk_size,
        "chunk_left": chunk_left,
        "chunk_phase": chunk_phase,
        "scale": scale,
        "content_factor": content_factor,
        "position_factor": position_factor,
        "softcap": numbers.softcap if numbers.softcap > 0 else None,
        "threshold": _as_int32(int(numbers.dropout_p * 2**32)) if dropout else None,
        "dropout_scale": 1.0 / (1.0 - numbers.dropout_p) if dropout else None,
        "D": D,
        "DV": DV,
        "DP": DP,
        "BLOCK_D": block_size(D),
        "BLOCK_DV": block_size(DV),
        "BLOCK_DP": block_size(DP),
        "GROUP": H // max(k.shape[1], 1),
        "CLAMP": rules.clamp == 1,
        "FAR": has_far_keys(call, Tk),
    }


def score_factors(scale: float, pos_scale: float) -> tuple[float, float, float]:
    """factor, content, position: scale = factor · content and pos_scale = factor · position.

    The kernels multiply queries by `content` and `position` before they round them, and scores by
    `factor`, which is above 0: a factor of 0 or below would change masked scores, -inf. `content`
    is 0 or a power of two, so that content products are exact; neither exceeds 1 in magnitude, so
    that no query overflows. A scale that a GPU rounds to 0 is 0.
    """
    scale, pos_scale = _in_float32(scale), _in_float32(pos_scale)
    if scale == 0.0:
        factor = abs(pos_scale) or 1.0
        return factor, 0.0, pos_scale / factor
    mantissa, exponent = math.frexp(pos_scale / scale)
    exponent = max(0, exponent - (abs(mantissa) == 0.5))
    factor = math.ldexp(abs(scale), exponent)
    return factor, scale / factor, pos_scale / factor


def _in_float32(factor: float) -> float:
    """0 below float32's normal numbers, and at most half of the largest one."""
    if abs(factor) < torch.finfo(torch.float32).tiny:
        return 0.0
    return math.copysign(min(abs(factor), 2.0**126), factor)


def has_far_keys(call: RelAttentionCall, Tk: int) -> bool:
    """Whether a query may attend to a key without a row of r, by lengths and window alone."""
    rules, Tq, R = call.rules, call.q.shape[2], call.r.shape[2]
    lowest, highest = -rules.window_left, rules.window_right  # of j - p
    if call.optional.q_start is None:
        lowest, highest = max(lowest, 1 - Tk), min(highest, Tq - 1)
    offset = rules.offset + Tk - Tq
    return rules.clamp == 0 and (lowest + offset < 0 or highest + offset >= R)


def _of_row_or_query(limit: Tensor | None, Tq: int) -> tuple[Tensor | None, Tensor | None]:
    """(a limit of each row, [B] and contiguous, None) or (None, one of each query, [B, Tq]).

    For one query both are the same, and a row's limit is cheaper.
    """
    if limit is not None and limit.dim() == 2:
        if Tq != 1:
            return None, limit
        limit = limit[:, 0]
    return _contiguous(limit), None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


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


def _normal_chunk(rules: Rules, far: int) -> tuple[int, int, int] | tuple[None, None, None]:
    """The same borders between positions -far and far from numbers that are small and above 0.

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
    phase += -(-far // size) * size
    return size, min(left, 2 * far // size + 1), phase


def _as_int32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
