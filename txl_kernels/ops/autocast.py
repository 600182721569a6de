"""Autocast for the public ops: what torch's own policy would do, done once, before the choice."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_CAST = (torch.float32, torch.bfloat16, torch.float16)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of an autocast region that is open for this kind of device, or None."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    """float32 and 16-bit tensors to `dtype`, anything else as it is, as torch's autocast does."""
    if dtype is None or not isinstance(tensor, Tensor) or tensor.dtype not in _CAST:
        return tensor
    return tensor.to(dtype)


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keeps an open autocast region from casting the products inside an implementation again."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
