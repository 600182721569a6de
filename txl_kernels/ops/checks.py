"""Checks shared by the public ops. Each error names the op, the argument, what was due and came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from txl_kernels.transforms import inside_transform, is_jit_tracing

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        due = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{op}: {name} must be {due}, got {tensor.dtype}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_shape(
    op: str, name: str, tensor: Tensor, due: Sequence[int | str], *, or_one: Sequence[int] = ()
) -> None:
    """`due` holds one size per dimension; a string is a free size's name.

    The dimensions in `or_one` may also be 1.
    """
    shape = tensor.shape
    fits = len(shape) == len(due)
    for axis, size in enumerate(due if fits else ()):
        if not (isinstance(size, str) or shape[axis] == size):
            fits = fits and axis in or_one and shape[axis] == 1
    if not fits:
        words = [f"1 or {size}" if axis in or_one else str(size) for axis, size in enumerate(due)]
        raise ValueError(f"{op}: {name} must have shape [{', '.join(words)}], got {list(shape)}")


def check_broadcastable(op: str, name: str, tensor: Tensor, due: Sequence[int]) -> None:
    shape = tensor.shape
    if len(shape) <= len(due) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(due), strict=False)
    ):
        return
    raise ValueError(f"{op}: {name} must broadcast to {list(due)}, got {list(shape)}")


def is_traced_size(value: object) -> bool:
    """Whether `torch.jit.trace` runs and the value is a tensor: it counts sizes in tensors."""
    return is_jit_tracing() and isinstance(value, Tensor)


def fixed_if_traced(value: Any) -> Any:
    """A size inside `torch.jit.trace` as a constant, of which torch warns; other values as given.

    A kernel's operator would turn it into a constant without a warning.
    """
    return int(value) if is_traced_size(value) else value


def check_int(op: str, name: str, value: object, *, at_least: int | None = None) -> None:
    """Accepts Python's integers, symbolic ones and the sizes of `torch.jit.trace`, but no bool."""
    if is_traced_size(value):
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{op}: {name} must be at least {at_least}, got {value}")


def check_flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_number(op: str, name: str, value: object, *, at_least: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{op}: {name} must be at least {at_least}, got {value}")


def check_choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        due = " or ".join(repr(word) for word in allowed)
        raise ValueError(f"{op}: {name} must be {due}, got {value!r}")


def check_given(
    op: str,
    tensors: Mapping[str, Tensor | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Every tensor that is given has one of these dtypes and stands on this device."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(op, name, tensor)
            check_dtype(op, name, tensor, dtypes)
            check_device(op, name, tensor, device)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass through a call with these tensors can follow.

    Inside `torch.vmap` every tensor counts: there `requires_grad` is False whatever the batch is.
    """
    batched = inside_transform("vmap")
    return torch.is_grad_enabled() and any(
        tensor is not None and (batched or tensor.requires_grad) for tensor in tensors
    )
