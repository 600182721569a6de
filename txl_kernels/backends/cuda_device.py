"""Whether there is a CUDA device that the kernels run on, in one sentence for every backend."""

from __future__ import annotations

import functools

import torch

_OLDEST_CAPABILITY = (8, 0)


@functools.cache
def unavailable_reason() -> str | None:
    """None where torch's current CUDA device serves, else one sentence that says why none does."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < _OLDEST_CAPABILITY:
        return (
            "the CUDA and Triton kernels need compute capability 8.0 or newer, "
            f"and this device has {major}.{minor}"
        )
    return None
