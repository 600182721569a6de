"""Plans of `rel_attention`: an eager call on a CPU that equals an earlier one is not checked again.

Checks, normalisation and the choice of a backend depend on the key of a call alone. With a plan, a
small call without gradients also skips the autograd kernel in Python, half of its time.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from txl_kernels._rel_attention_call import OptionalTensors, Options
from txl_kernels.backends import verification
from txl_kernels.ops.rel_attention_calls import Prepared

_MOST_PLANS = 1024  # a decoding loop has other lengths in every call
_TENSORS = frozenset((Tensor, torch.nn.Parameter))


class Plan(NamedTuple):
    """The arguments of the operator that do not change, and whether gradients are needed."""

    operator: Callable[..., Any]
    absent: Tensor
    rules: list[int]
    numbers: list[float]
    needs_grad: bool

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, r: Tensor, optional: OptionalTensors
    ) -> tuple[Tensor, Tensor]:
        """Returns out and lse."""
        absent = self.absent
        tensors = [absent if x is None else x for x in optional]
        if self.needs_grad:
            out, lse = self.operator(q, k, v, r, tensors, self.rules, self.numbers)
            return out, lse
        # As torch.library's own autograd kernels do. `torch.inference_mode` would return tensors
        # that no later computation may differentiate.
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = self.operator(q, k, v, r, tensors, self.rules, self.numbers)
            return out, lse


_plans: dict[tuple[Any, ...], Plan] = {}


def key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    optional: OptionalTensors,
    bias: Tensor | None,
    options: Options,
) -> tuple[Any, ...] | None:
    """Equal for two calls that differ in the values of tensors only; None for calls without plan.

    The latter are traced, transformed or autocast calls, calls outside the CPU, and those with
    tensors whose rows have to be copied.
    """
    if torch.compiler.is_compiling() or bias is not None or _is_changed():
        return None
    try:  # bytes, since 1, 1.0 and True are equal; version 2 depends on the values alone
        parts: list[Any] = [marshal.dumps((*options,), 2)]
    except ValueError:  # symbolic numbers, and others that are no Python numbers
        return None
    needs_grad, add = False, parts.append
    for x in (q, k, v, r, *optional):
        if x is None:
            add(None)
        elif type(x) in _TENSORS and x.is_cpu and x.ndim and x.stride(-1) == 1:
            add((x.shape, x.dtype))
            needs_grad = needs_grad or x.requires_grad
        else:
            return None
    add(needs_grad and torch.is_grad_enabled())
    return tuple(parts)


def _is_changed() -> bool:
    """Whether a mode, a transform, a tracer or autocast changes what a call does."""
    return bool(
        torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or "cpu" in verification.DEVICE_TYPES
    )


def get(key: tuple[Any, ...] | None) -> Plan | None:
    """The plan of an earlier call with this key."""
    return None if key is None else _plans.get(key)


def add(key: tuple[Any, ...] | None, prepared: Prepared) -> None:
    """Keeps the plan of a call to the native backend that had nothing to expand or draw."""
    call = prepared.call
    if key is None or prepared.backend != "native" or call.numbers.dropout_p > 0:
        return
    if call.optional.mask is not None:  # would have to be expanded
        return
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    with torch.inference_mode(False):
        absent = torch.empty(0, dtype=call.q.dtype)
    operator = torch.ops.txl_native.rel_attention_fwd.default
    numbers = list(call.numbers)
    _plans[key] = Plan(operator, absent, list(call.rules), numbers, key[-1])


def clear() -> None:
    """Forgets all plans."""
    _plans.clear()
