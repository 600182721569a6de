"""Plans of `rel_attention`: an eager call on a CPU that equals an earlier one is not checked again.

Checks, normalisation and the choice of a backend depend on the key of a call alone. With a plan, a
small call without gradients also skips the autograd kernel in Python, half of its time.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd, _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from txl_kernels.backends import verification
from txl_kernels.ops.rel_attention_calls import Prepared

_MOST_PLANS = 1024  # a decoding loop has other lengths in every call
_TENSORS = frozenset((Tensor, torch.nn.Parameter))


class Plan(NamedTuple):
    """The arguments of the operator that do not change, and whether gradients are needed."""

    operator: Callable[..., Any]
    absent: Tensor
    optional: list[Tensor] | None  # of a call that gives none of the optional tensors
    rules: list[int]
    numbers: list[float]
    needs_grad: bool

    def run(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Returns out and lse of q, k, v, r and the optional tensors."""
        optional, absent = self.optional, self.absent
        if optional is None:
            optional = [absent if x is None else x for x in tensors[4:]]
        if self.needs_grad:
            return self.operator(*tensors[:4], optional, self.rules, self.numbers)  # type: ignore[no-any-return]
        # As torch.library's own autograd kernels do. `torch.inference_mode` would return tensors
        # that no later computation may differentiate.
        with _AutoDispatchBelowAutograd():
            return self.operator(*tensors[:4], optional, self.rules, self.numbers)  # type: ignore[no-any-return]


_plans: dict[tuple[Any, ...], Plan] = {}


def key(
    tensors: Sequence[Tensor | None], bias: Tensor | None, options: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Equal for two calls that differ in the values of tensors only; None for calls without plan.

    The latter are traced, transformed or autocast calls, calls outside the CPU, and those with
    tensors whose rows have to be copied.

    Args:
        tensors: q, k, v, r and the optional tensors, as the caller gives them.
        options: the fields of `Options`.
    """
    if torch.compiler.is_compiling() or bias is not None or _is_changed():
        return None
    try:  # bytes, since 1, 1.0 and True are equal; version 2 depends on the values alone
        parts: list[Any] = [marshal.dumps(options, 2)]
    except ValueError:  # symbolic numbers, and others that are no Python numbers
        return None
    may_need_grad, needs_grad = torch.is_grad_enabled(), False
    for x in tensors:
        if x is None:
            parts.append(None)
            continue
        shape = x.shape if type(x) in _TENSORS else None
        if not shape or not x.is_cpu or x.stride(-1) != 1:
            return None
        parts += (shape, x.dtype)
        if may_need_grad and x.requires_grad:
            needs_grad = True
    parts.append(needs_grad)
    return tuple(parts)


def _is_changed() -> bool:
    """Whether a mode, a transform, a tracer or autocast changes what a call does."""
    return bool(
        torch.is_autocast_enabled("cpu")
        or _len_torch_dispatch_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _is_tracing()
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
    has_optional = any(x is not None for x in call.optional)
    _plans[key] = Plan(
        torch.ops.txl_native.rel_attention_fwd.default,
        absent,
        None if has_optional else [absent] * len(call.optional),
        list(call.rules),
        list(call.numbers),
        needs_grad=key[-1],
    )


def clear() -> None:
    """Forgets all plans."""
    _plans.clear()
