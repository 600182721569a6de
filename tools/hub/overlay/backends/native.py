"""The native backend, which this kernel does not have: it contains no compiled code."""

from __future__ import annotations

from pathlib import Path

from txl_kernels.errors import BackendUnavailableError

_REASON = (
    "this kernel for Hugging Face's `kernels` contains no compiled code; the package has native "
    "kernels (`pip install transformer-xl`, then `import txl_kernels`)"
)


def register_kernels() -> None:
    """Does nothing: there are no native operators."""


def unavailable_reason() -> str:
    """One sentence that says why there are no native kernels."""
    return _REASON


def no_kernel_reason(op: str, device_type: str) -> str:
    """The same sentence."""
    return _REASON


def library_path() -> Path:
    """Raises BackendUnavailableError: there is no library."""
    raise BackendUnavailableError(_REASON)
