"""The Triton backend: availability check and operators. Does not import Triton itself."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from txl_kernels._namespaces import TRITON
from txl_kernels.backends import cuda_device
from txl_kernels.backends.triton import kernels

# The versions of Triton whose machine code `make gates` checks: the oldest supported, the newest.
CHECKED_TRITON_VERSIONS = ("3.6.0", "3.9.0")


def register_kernels() -> None:
    """Adds kernels to the operators of `torch.ops.txl_triton`; the first call imports Triton.

    Kernels for CPU tensors raise an error unless Triton's interpreter is on.
    """
    operators = TRITON
    for operator, kernel in (
        (operators.rel_attention_fwd, kernels.rel_attention_fwd),
        (operators.rel_attention_bwd, kernels.rel_attention_bwd),
        (operators.rel_shift_fwd, kernels.rel_shift_fwd),
        (operators.rel_shift_bwd, kernels.rel_shift_bwd),
        (operators.adaptive_nll_fwd, kernels.adaptive_nll_fwd),
        (operators.adaptive_nll_bwd, kernels.adaptive_nll_bwd),
        (operators.adaptive_loss_fwd, kernels.adaptive_loss_fwd),
        (operators.adaptive_loss_bwd, kernels.adaptive_loss_bwd),
        (operators.adaptive_embedding_fwd, kernels.adaptive_embedding_fwd),
        (operators.adaptive_embedding_bwd, kernels.adaptive_embedding_bwd),
    ):
        name = operator.default.name()
        torch.library.impl(name, "CUDA", kernel)
        torch.library.impl(name, "CPU", _when_interpreting(kernel))


def _when_interpreting(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def interpreted(*args: Any) -> Any:
        reason = unavailable_reason("cpu")
        if reason is not None:
            raise RuntimeError(reason)
        return kernel(*args)

    return interpreted


@functools.cache
def unavailable_reason(device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """None if Triton kernels can run on this kind of device, else the reason in one sentence.

    Never raises.
    """
    if not _is_installed():
        return "Triton is not installed (pip install triton)"
    if dtype == torch.bfloat16 and interprets():
        return "Triton's interpreter computes garbage in bfloat16: unset TRITON_INTERPRET"
    if device_type == "cpu":
        if interprets():
            return None
        return "Triton runs on a CPU in its interpreter only: start Python with TRITON_INTERPRET=1"
    if device_type != "cuda":
        return f"the Triton kernels run on CUDA devices, not on {device_type}"
    return cuda_device.unavailable_reason()


@functools.cache
def interprets() -> bool:
    """Whether Triton's interpreter is on. Triton decides this when it decorates a kernel."""
    if not _is_installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def unchecked_version() -> str | None:
    """One sentence if the machine code of the installed Triton was not checked, else None."""
    import triton

    if triton.__version__ in CHECKED_TRITON_VERSIONS:
        return None
    return (
        f"Triton {triton.__version__} was not checked with these kernels, only "
        f"{' and '.join(CHECKED_TRITON_VERSIONS)}: each kernel is tested on this device before its "
        "first use"
    )


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules["triton"] is None: its import is blocked
        return False
