"""All private parts of torch that the two packages use; other modules import them from here.

torch may change these in any release, and torch 2.11 to 2.15 have no public functions that do the
same. For each part, a check in `tests/txl_kernels/test_torch_private.py` fails when a new torch
changes what the part does. `import torch` loads all of them, so this module loads nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

try:
    from torch import _add_batch_dim, _remove_batch_dim
    from torch import _assert_async as assert_async
    from torch._C import _AutoDispatchBelowAutograd as AutoDispatchBelowAutograd
    from torch._C import (
        _dispatch_has_kernel_for_dispatch_key,
        _dispatch_key_for_device,
        _is_tracing,
        _len_torch_dispatch_stack,
        _vmapmode_decrement_nesting,
        _vmapmode_increment_nesting,
    )
    from torch._C._functorch import (
        get_interpreter_stack,
        get_unwrapped,
        is_batchedtensor,
        is_functorch_wrapped_tensor,
        is_legacy_batchedtensor,
        peek_interpreter_stack,
    )
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.nn.modules.adaptive import _ASMoutput as ASMoutput
    from torch.nn.modules.module import _has_any_global_hook
    from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

    # The operators of `scaled_dot_product_attention`, which does not return the logarithm of the
    # softmax's denominator.
    flash_attention_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_attention_cpu_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    flash_attention_cuda = torch.ops.aten._scaled_dot_product_flash_attention
    flash_attention_cuda_bwd = torch.ops.aten._scaled_dot_product_flash_attention_backward
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"txl_kernels uses a private part of torch that torch {torch.__version__} does not have "
        f"({error}); it was developed for torch 2.11 to 2.15"
    ) from error

# Parts that other modules use as torch defines them:
#   ASMoutput                  the type that torch's adaptive softmax returns; our replacement of it
#                              returns the same type
#   AutoDispatchBelowAutograd  calls an operator without its autograd kernel, as torch.library does
#   FakeTensor, FakeTensorMode tensors without memory: `verify` runs calls on them
#   assert_async               checks a condition on the device; the host does not wait for it
#   tree_leaves, tree_map, …   nested lists and tuples of arguments
__all__ = [
    "ASMoutput",
    "AutoDispatchBelowAutograd",
    "FakeTensor",
    "FakeTensorMode",
    "argument_names",
    "assert_async",
    "changes",
    "constant_in_traces",
    "flash_attention_cpu",
    "flash_attention_cpu_bwd",
    "flash_attention_cuda",
    "flash_attention_cuda_bwd",
    "forward_hooks",
    "forward_pre_hooks",
    "has_hooks",
    "has_kernel",
    "in_forward_mode",
    "is_batched",
    "is_changed",
    "is_compiled_in_place",
    "is_legacy_batched",
    "is_traced_or_fake",
    "legacy_batched",
    "legacy_level",
    "legacy_unbatched",
    "modules_of",
    "open_transforms",
    "parameters_of",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "unwrapped",
    "whole",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# ---- tracers


def constant_in_traces(function: _Function) -> _Function:
    """Marks a function whose result `torch.compile` takes as a constant and does not trace.

    `torch.compiler.assume_constant_result` sets the same mark, but it imports torch._dynamo, which
    takes seconds, and with it Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_traced_or_fake(tensors: Sequence[Tensor]) -> bool:
    """Whether `make_fx` records operators, or a mode of fake tensors computes shapes alone."""
    return get_proxy_mode() is not None or detect_fake_mode(tensors) is not None


def is_changed() -> bool:
    """Whether a mode, a transform, a tracer or autocast on the CPU changes what a call does.

    Each small call on a CPU runs this function; public functions would need several microseconds.
    """
    return bool(
        torch.is_autocast_enabled("cpu")
        or _len_torch_dispatch_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _is_tracing()
    )


# ---- transforms


def open_transforms() -> list[str]:
    """The transforms of `torch.func` that this call runs inside, from the outermost: "vmap", …"""
    return [level.key().name.lower() for level in get_interpreter_stack() or ()]


def in_forward_mode() -> bool:
    """Whether `torch.autograd.forward_ad.dual_level` is open."""
    return forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether `torch.vmap` or `torch.autograd.grad(is_grads_batched=True)` batches this tensor."""
    return is_batchedtensor(tensor) or is_legacy_batchedtensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor beneath all levels of `torch.func`: the values of the whole batch."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


# `torch.autograd.grad(is_grads_batched=True)` batches with an older vmap than `torch.vmap`.


def legacy_level() -> int:
    """The number of the innermost batch of `is_grads_batched`.

    It is 1 in threads of autograd, where torch counts none.
    """
    level = max(_vmapmode_increment_nesting() - 1, 1)
    _vmapmode_decrement_nesting()
    return level


def is_legacy_batched(x: Any) -> bool:
    """Whether `is_grads_batched` batches this argument."""
    return isinstance(x, Tensor) and is_legacy_batchedtensor(x)


def legacy_unbatched(x: Tensor, level: int) -> Tensor:
    """The tensor of the whole batch, with the batch as its first dimension."""
    return _remove_batch_dim(x, level, 1, 0)


def legacy_batched(x: Tensor, level: int) -> Tensor:
    """A tensor whose first dimension is the batch, as `is_grads_batched` represents it."""
    return _add_batch_dim(x, 0, level)


# ---- operators


def has_kernel(operator: str, device_type: str) -> bool:
    """Whether an operator ("namespace::name") has a kernel for this kind of device."""
    key = _dispatch_key_for_device(device_type)
    return _dispatch_has_kernel_for_dispatch_key(operator, key)


def argument_names(operator: Any) -> list[str]:
    """The names of the arguments of one overload of an operator, in order."""
    return [argument.name for argument in operator._schema.arguments]


# ---- tensors


def changes(tensor: Tensor) -> int:
    """How often an operator has changed the tensor in place."""
    return tensor._version


def whole(tensor: Tensor) -> Tensor:
    """The tensor whose memory a view shows, such as the table of a slice; itself if it is none."""
    return tensor if tensor._base is None else tensor._base


# ---- modules: torch can add hooks, but has no public way to read them


def modules_of(module: nn.Module) -> list[nn.Module]:
    """A module and its submodules; one that has several names is repeated.

    `module.modules()` takes several times as long, since it also builds the name of each submodule.
    """
    found = [module]
    for each in found:  # the loop also visits the modules that it appends
        if children := each._modules:
            found += [child for child in children.values() if child is not None]
    return found


def parameters_of(module: nn.Module) -> list[Tensor]:
    """The parameters of a module and its submodules; one that has several names is repeated.

    `module.parameters()` takes four times as long: 0.3 ms for 200 parameters.
    """
    return [
        parameter
        for each in modules_of(module)
        for parameter in each._parameters.values()
        if parameter is not None
    ]


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run before `module.forward`, in order."""
    return list(module._forward_pre_hooks.values())


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run after `module.forward`, in order."""
    return list(module._forward_hooks.values())


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: calls of the module run a compiled program."""
    return module._compiled_call_impl is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` or its backward pass runs any hook, global ones included."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )
