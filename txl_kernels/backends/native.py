"""The native backend: loads the library for the installed torch and registers its kernels.

Imports never fail because of the native part: whatever is missing or damaged is a reason, with the
command that completes the installation (`native_installation`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from txl_kernels.backends import native_installation as installation
from txl_kernels.backends.native_installation import build_command, without_command
from txl_kernels.errors import BackendUnavailableError

__all__ = [
    "build_command",
    "build_info",
    "library_path",
    "load",
    "no_kernel_reason",
    "register_kernels",
    "unavailable_reason",
    "without_command",
]


def library_path() -> Path:
    """The library for the installed torch, whether or not it exists."""
    return installation.library_path(torch.__version__)


def load() -> None:
    """Loads the library, which registers the kernels as `torch.ops.txl_native.*`.

    Raises:
        OSError: the library is missing or does not load (`unavailable_reason` says why).
    """
    torch.ops.load_library(str(library_path()))  # type: ignore[no-untyped-call]


@functools.cache
def build_info() -> dict[str, Any]:
    """What the library was built for and with: the build record.

    `_C` reads the record that is compiled into the loaded library. Without a `_C` for this Python,
    it is read from the file beside the library.

    Raises:
        OSError: the library is missing or does not load.
    """
    load()
    path = library_path()
    earlier = installation.PACKAGE_DIR / installation.EARLIER_RECORD_NAME
    module = None
    if not earlier.exists():  # else _C may be an earlier version's, which would load its kernels
        with contextlib.suppress(ImportError):
            module = importlib.import_module("txl_kernels._C")
    if module is None:
        return installation.read_record(path.with_name(installation.RECORD_NAME))
    record: dict[str, Any] = module.build_info(os.fsencode(path))
    return record


def register_kernels() -> None:
    """Adds kernels to the operators of `torch.ops.txl_native` that load the library at first use.

    A program that torch exported or compiled earlier calls the operators themselves, in a process
    where no public op has loaded it. The kernels in the library then replace these.
    """
    operators = torch.ops.txl_native
    for op, directions in (
        ("rel_attention", (operators.rel_attention_fwd, operators.rel_attention_bwd)),
        ("rel_shift", (operators.rel_shift_fwd, operators.rel_shift_bwd)),
        ("adaptive_nll", (operators.adaptive_nll_fwd, operators.adaptive_nll_bwd)),
        ("adaptive_loss", (operators.adaptive_loss_fwd, operators.adaptive_loss_bwd)),
        (
            "adaptive_embedding",
            (operators.adaptive_embedding_fwd, operators.adaptive_embedding_bwd),
        ),
        ("few_row_linear", (operators.few_row_linear_fwd,)),
    ):
        for operator in directions:
            name = str(operator.default.name())  # type: ignore[no-untyped-call]
            torch.library.impl(name, "default", _loading(op, operator))


def _loading(op: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        reason = unavailable_reason()
        if reason is None and _first_use.is_running:  # the library has no kernel for these tensors
            reason = no_kernel_reason(op, _device_type(args))
        if reason is not None:
            raise BackendUnavailableError(f"{op}: {reason}")
        _first_use.is_running = True
        try:
            return operator(*args)
        finally:
            _first_use.is_running = False

    return kernel


class _FirstUse(threading.local):
    """Whether this thread calls an operator again, after it has loaded the library."""

    is_running = False


_first_use = _FirstUse()


def _device_type(args: Sequence[Any]) -> str:
    """The kind of device of the first tensor: all tensors of a call are on one device."""
    tensors = (part for x in args for part in (x if isinstance(x, list) else [x]))
    return next(part.device.type for part in tensors if isinstance(part, torch.Tensor))


@functools.cache
def unavailable_reason() -> str | None:
    """None if the native kernels are loaded and ready, else one sentence that says why not.

    The sentence ends with the command that builds them, where a build helps. The build record is
    checked before anything is loaded. Never raises.
    """
    try:
        reason = installation.refusal(torch.__version__)
        if reason is not None:
            return reason
        load()
        return _products_refusal()
    except (OSError, AttributeError, RuntimeError) as error:
        why = error.__cause__ or error
        return installation.with_command(
            f"the native library {library_path()} does not load ({why})"
        )


def _products_refusal() -> str | None:
    """Why the loaded library cannot compute products here, or None.

    The operator is called in another thread: where the caller traces or uses fake tensors, its own
    thread would record the call instead of running it.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        operator = torch.ops.txl_native.gemm_unavailable_reason
        reason: str | None = executor.submit(operator).result()
        return reason


@functools.cache
def no_kernel_reason(op: str, device_type: str) -> str:
    """Says that the loaded library has no kernel for `op` on this kind of device, and why."""
    unknown = {"built": False, "reason": "its build record does not mention CUDA"}
    cuda = build_info().get("cuda", unknown)
    built_without = device_type == "cuda" and not cuda["built"]
    why = f" ({cuda['reason']})" if built_without else ""
    return f"the native library here has no {device_type.upper()} kernel for {op}{why}"
