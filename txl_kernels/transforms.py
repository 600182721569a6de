"""Which of torch's transforms and tracers a call runs inside."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from txl_kernels.torch_private import (
    FakeTensor,
    constant_in_traces,
    in_forward_mode,
    open_transforms,
)


# The compiler opens the transforms that it traces, and recompiles where others are open.
@constant_in_traces
def inside_transform(*kinds: str) -> bool:
    """Whether this call runs inside one of these transforms, at any depth.

    Args:
        kinds: "vmap"; "grad", which is `torch.func.grad`, `vjp`, `jacrev` and `hessian`; "jvp",
            which is `torch.func.jvp`, `jacfwd` and `torch.autograd.forward_ad.dual_level`.
    """
    is_dual = "jvp" in kinds and in_forward_mode()
    return is_dual or any(transform in kinds for transform in open_transforms())


@constant_in_traces
def is_exporting() -> bool:
    """Whether `torch.export` traces this call.

    In programs that `torch.compile` of torch 2.11 traces, `torch.compiler.is_exporting()` is always
    True; the tracer calls this function instead and receives the right value.
    """
    return bool(torch.compiler.is_exporting())


@constant_in_traces
def is_exporting_onnx() -> bool:
    """Whether torch exports to ONNX at the moment; imports nothing of torch.onnx."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def is_recorded(x: Tensor) -> bool:
    """Whether this call is compiled, or captured in a CUDA graph: later runs repeat no decision of
    the host."""
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def is_unreadable(x: Tensor) -> bool:
    """Whether the host cannot read values of `x` now: the call is recorded or inside a transform of
    `torch.func`, or `x` is a fake tensor."""
    return is_recorded(x) or bool(open_transforms()) or isinstance(x, FakeTensor)


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` records this call. Sizes are tensors of no dimension there."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def kernel_refusal(backend: str) -> str | None:
    """Why the kernels of `backend` cannot run inside the transforms that are open here, or None."""
    if not inside_transform("grad", "jvp"):
        return None
    return (
        f"{backend} runs neither inside torch.func.grad, vjp, jacrev and jvp nor under "
        'forward-mode differentiation: pass backend="reference"'
    )
