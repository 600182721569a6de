"""The dtype of the reference's products and sums, and the cast to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Any]:
    """The tensors in `dtype`, None for None.

    A tensor that occurs twice is cast once. Its gradient is then summed in `dtype` and rounded
    to the tensor's own dtype once; two casts would give a sum of two rounded gradients.
    """
    tensors = list(tensors)
    wide = {tensor: tensor.to(dtype) for tensor in tensors if tensor is not None}
    return [None if tensor is None else wide[tensor] for tensor in tensors]
