"""Autocast for the public ops: the casts of torch's own policy, done once, before the choice of a
backend."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from txl_kernels.torch_private import constant_in_traces

_CAST = (torch.float32, torch.bfloat16, torch.float16)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast region that is open for this kind of device, or None.

    torch raises for kinds of device that have no autocast, such as "meta".
    """
    kind = device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


@constant_in_traces  # torch.compile of torch 2.11 cannot trace the function that this one calls
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def cast(tensor: Any, dtype: torch.dtype | None) -> Any:
    """Casts float32 and 16-bit tensors to `dtype`, as torch's autocast does; returns others as
    they are."""
    if dtype is None or not isinstance(tensor, Tensor) or tensor.dtype not in _CAST:
        return tensor
    return tensor.to(dtype)


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keeps an open autocast region from casting the products inside an implementation again."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
