"""Which of torch's transforms and tracers a call runs inside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def inside_transform(*kinds: str) -> bool:
    """Whether this call runs inside one of these transforms, at any depth.

    Args:
        kinds: "vmap"; "grad", which is `torch.func.grad`, `vjp`, `jacrev` and `hessian`; "jvp",
            which is `torch.func.jvp`, `jacfwd` and `torch.autograd.forward_ad.dual_level`.
    """
    levels = torch._C._functorch.get_interpreter_stack() or ()
    is_dual = "jvp" in kinds and forward_ad._current_level >= 0
    return is_dual or any(level.key().name.lower() in kinds for level in levels)


# The same mark as `torch.compiler.assume_constant_result` sets, without importing torch._dynamo:
# the compiler opens the transforms that it traces, and recompiles where others are open.
inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_jit_tracing() -> bool:
    """Whether `torch.jit.trace` records this call. Sizes are tensors of no dimension there."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_batched(tensor: Tensor) -> bool:
    """Whether `torch.vmap` or `torch.autograd.grad(is_grads_batched=True)` batches this tensor."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor beneath all levels of `torch.func`: the values of the whole batch."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def kernel_refusal(backend: str) -> str | None:
    """Why the kernels of `backend` cannot run inside the transforms that are open here, or None."""
    if not inside_transform("grad", "jvp"):
        return None
    return (
        f"{backend} runs neither inside torch.func.grad, vjp, jacrev and jvp nor under "
        'forward-mode differentiation: pass backend="reference"'
    )
