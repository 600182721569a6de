"""Checks shared by the public ops.

Each error names the op, the argument, the expected and the actual value.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from txl_kernels.transforms import inside_transform, is_exporting, is_jit_tracing

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INT64 = torch.iinfo(torch.int64)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)


def check_tensor(op: str, name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless the tensor has one of these dtypes."""
    if tensor.dtype not in allowed:
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{op}: {name} must be {expected}, got {tensor.dtype}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises ValueError unless the tensor is on this device."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_shape(
    op: str, name: str, tensor: Tensor, expected: Sequence[int | str], *, or_one: Sequence[int] = ()
) -> None:
    """Raises ValueError unless the tensor has the expected size in each dimension.

    A string stands for any size, which it names in the message. The dimensions in `or_one` may
    also be 1.
    """
    shape = tensor.shape
    fits = len(shape) == len(expected)
    for axis, size in enumerate(expected if fits else ()):
        if not (isinstance(size, str) or shape[axis] == size):
            fits = fits and axis in or_one and shape[axis] == 1
    if not fits:
        sizes = [
            f"1 or {size}" if axis in or_one else str(size) for axis, size in enumerate(expected)
        ]
        raise ValueError(f"{op}: {name} must have shape [{', '.join(sizes)}], got {list(shape)}")


def check_broadcastable(op: str, name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Raises ValueError unless the tensor broadcasts to the expected shape."""
    shape = tensor.shape
    if len(shape) <= len(expected) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(expected), strict=False)
    ):
        return
    raise ValueError(f"{op}: {name} must broadcast to {list(expected)}, got {list(shape)}")


def fixed_if_traced(value: Any) -> Any:
    """A size inside `torch.jit.trace` as a constant, of which torch warns; other values as given.

    A kernel's operator would turn it into a constant without a warning.
    """
    return int(value) if is_traced_size(value) else value


def check_int(op: str, name: str, value: object, *, at_least: int | None = None) -> int:
    """Returns `value` as a Python integer; a traced or symbolic one stays as it is.

    Every type with `__index__` is accepted, such as NumPy's integers, except Booleans and tensors.

    Raises:
        TypeError: not an integer.
        ValueError: below `at_least`, or outside the range of int64.
    """
    number: Any = value
    if is_traced_size(value):
        return number  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            number = (
                None if _is_bool(value) or isinstance(value, Tensor) else operator.index(number)
            )
        except TypeError:  # no __index__, or one that refuses: an array of several numbers
            number = None
        if number is None:
            raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if not (_may_be_symbolic(number) or _INT64.min <= number <= _INT64.max):
        raise ValueError(f"{op}: {name} must be a 64-bit integer, got {_shown(number)}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{op}: {name} must be at least {at_least}, got {number}")
    return number  # type: ignore[no-any-return]


def _is_bool(value: object) -> bool:
    """Whether it is Python's or NumPy's Boolean; the latter has `__index__` before NumPy 2.3."""
    return isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b"


def _shown(number: object) -> str:
    """The number for a message; Python refuses to print integers of more than 4,300 digits."""
    if isinstance(number, int) and number.bit_length() > 1000:
        return f"an integer of {number.bit_length()} bits"
    return str(number)


def check_number(op: str, name: str, value: object, *, at_least: float | None = None) -> float:
    """Returns `value` as a Python float; a traced or symbolic number stays as it is.

    Every `numbers.Real` is accepted, such as NumPy's numbers, except bool.

    Raises:
        TypeError: not a number.
        ValueError: below `at_least`, NaN, or too large for a float.
    """
    number: Any = value
    if is_traced_size(value):
        return number  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not _may_be_symbolic(value):
        try:
            number = float(number)
        except OverflowError:
            number = math.inf
        if not -math.inf < number < math.inf:
            raise ValueError(f"{op}: {name} must be finite, got {_shown(value)}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{op}: {name} must be at least {at_least}, got {value}")
    return number  # type: ignore[no-any-return]


def checked_window(op: str, window: Sequence[int | None] | None) -> tuple[int | None, int | None]:
    """The sides of a window as Python integers; None is a side without a limit.

    Raises:
        TypeError: a side is not an integer.
        ValueError: not a pair, or a side is below 0.
    """
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"{op}: window must be (left, right), got {window!r}")
    left, right = (
        None if side is None else check_int(op, name, side, at_least=0)
        for name, side in zip(("window's left", "window's right"), window, strict=True)
    )
    return left, right


def is_traced_size(value: object) -> bool:
    """Whether `value` is computed from a size while `torch.jit` traces: it is a tensor then."""
    if not isinstance(value, Tensor) or value.ndim > 0:
        return False
    return is_jit_tracing()


def _may_be_symbolic(number: object) -> bool:
    """Whether `number` may be computed from a length that `torch.export` leaves open.

    Comparing such a number with the limits of a type would limit the length. Strict export shows
    symbolic numbers as plain ones.
    """
    if isinstance(number, (torch.SymInt, torch.SymFloat)):
        return True
    return is_exporting() and torch.compiler.is_dynamo_compiling()


def check_flag(op: str, name: str, value: object) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of these words."""
    if value not in allowed:
        expected = " or ".join(repr(word) for word in allowed)
        raise ValueError(f"{op}: {name} must be {expected}, got {value!r}")


def check_given(
    op: str,
    tensors: Mapping[str, Tensor | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Raises TypeError or ValueError unless all tensors have one of these dtypes and this device.

    None stands for a tensor that is not given.
    """
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
