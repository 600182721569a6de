"""Causal attention without positions by the flash operators of torch that SDPA also calls.

SDPA itself does not return the logarithm of the softmax's denominator, and its backward pass uses
its own. `banded_attention` needs that logarithm, and gives the backward pass another one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from txl_kernels.ops.checks import FLOATING
from txl_kernels.torch_private import (
    flash_attention_cpu,
    flash_attention_cpu_bwd,
    flash_attention_cuda,
    flash_attention_cuda_bwd,
)

# forward(q, k, v, scale) -> (out, lse); backward(dout, q, k, v, out, lse, scale) -> (dq, dk, dv)
Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, ...]]

_DTYPES = {"cpu": FLOATING, "cuda": (torch.bfloat16, torch.float16)}
_CUDA_ALIGNMENT = 8  # elements: flash kernels on CUDA read rows of 16 bytes


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch has no flash operators for these tensors, or None."""
    if device.type not in _DTYPES:
        return f"torch has no flash attention on {device.type}"
    if dtype not in _DTYPES[device.type]:
        return f"torch has no flash attention for {dtype} on {device.type}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal softmax(scale · q kᵀ) v.

    Args:
        q: [B, H, T, D] with T at least 1, float32, float64 or 16 bits; on CUDA 16 bits only.
        k, v: [B, Hk, T, D] and [B, Hk, T, Dv]; H a multiple of Hk.
        scale: finite, of any sign.

    Returns:
        out [B, H, T, Dv] and lse [B, H, T], float32 (float64 for float64).
    """
    Dv = v.shape[3]
    if q.numel() == 0:
        return q.new_empty(*q.shape[:3], Dv), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))
    q, scale = _positive(q, scale)
    q, k, v = _one_width(q, k, v)
    if q.device.type == "cuda":
        out, lse, *_ = flash_attention_cuda(q, k, v, is_causal=True, scale=scale)
    else:
        out, lse = flash_attention_cpu(q, k, v, is_causal=True, scale=scale)
    return _narrow(out, Dv), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for probabilities exp(score - lse), where lse and out may be those of a sum.

    Args:
        dout, out: [B, H, T, Dv]; lse: [B, H, T].
        q, k, v, scale: the arguments of `forward`.

    Returns:
        dq [B, H, T, D], dk [B, Hk, T, D], dv [B, Hk, T, Dv].
    """
    D, Dv = q.shape[3], v.shape[3]
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    sign, (q, positive) = _sign(scale), _positive(q, scale)
    q, k, v, out, dout = _one_width(q, k, v, out, dout)
    if q.device.type == "cuda":
        # No cumulative lengths; without dropout the state of the generator is not read.
        lengths, state = (None, None, q.shape[2], k.shape[2]), q.new_empty(2, dtype=torch.uint64)
        dq, dk, dv = flash_attention_cuda_bwd(
            dout, q, k, v, out, lse, *lengths, 0.0, True, state, state, scale=positive
        )
    else:
        dq, dk, dv = flash_attention_cpu_bwd(dout, q, k, v, out, lse, 0.0, True, scale=positive)
    dq = _narrow(dq if sign == 1 else dq * sign, D)
    return dq, _narrow(dk, D), _narrow(dv, Dv)


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a factor above 0 that give the same scores.

    The kernels multiply masked scores, which are -infinity, by the factor.
    """
    sign = _sign(scale)
    return (q, scale) if sign == 1 else (q * sign, abs(scale) or 1.0)


def _sign(scale: float) -> int:
    return (scale > 0) - (scale < 0)


def _one_width(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros after their last dimension, so that all have the same head size."""
    tensors = (q, *others)
    width = max(x.shape[3] for x in tensors)
    if q.device.type == "cuda":
        width = -(-width // _CUDA_ALIGNMENT) * _CUDA_ALIGNMENT
    return tuple(x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in tensors)


def _narrow(x: Tensor, width: int) -> Tensor:
    return x if x.shape[3] == width else x.narrow(3, 0, width)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
