"""Which of torch's function transforms a call runs inside."""

from __future__ import annotations

import torch
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
