"""A linear layer in plain PyTorch: `F.linear`; int8 weights have a scale per output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from txl_kernels.backends.reference.precision import work_dtype


def few_row_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    weight_scale: Tensor | None,  # [N]
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """weight_scale · (x · weightᵀ) + bias: [..., N] in x's dtype.

    All arithmetic is in `compute_dtype`, by default x's dtype; with a scale float32 (float64 for
    float64).
    """
    dtype = compute_dtype or (x.dtype if weight_scale is None else work_dtype(x.dtype))
    wide, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if weight_scale is None:
        return F.linear(wide, weight, bias).to(x.dtype)
    out = F.linear(wide, weight) * weight_scale.to(dtype)
    return (out if bias is None else out + bias).to(x.dtype)
