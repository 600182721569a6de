"""Plans of `rel_attention`: an eager call on a CPU like an earlier one is not checked again.

Checks, normalisation and the choice of a backend depend on the key of a call alone. A planned call
also skips the operator's autograd kernel, which is Python: half of the time of a small call.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from txl_kernels._namespaces import NATIVE
from txl_kernels._rel_attention_call import N_DIFFERENTIABLE, output_gradients
from txl_kernels.backends import verification
from txl_kernels.ops.rel_attention_calls import Prepared
from txl_kernels.torch_private import AutoDispatchBelowAutograd, is_changed

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
        if self.needs_grad:
            return _Planned.apply(self, *tensors)  # type: ignore[no-any-return, no-untyped-call]
        # As torch.library's own autograd kernels do. `torch.inference_mode` would return tensors
        # that no later computation may differentiate.
        with AutoDispatchBelowAutograd():
            return self.operator(*self.arguments(tensors))  # type: ignore[no-any-return]

    def arguments(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The operator's arguments."""
        optional, absent = self.optional, self.absent
        if optional is None:
            optional = [absent if x is None else x for x in tensors[4:]]
        return (*tensors[:4], optional, self.rules, self.numbers)


class _Planned(torch.autograd.Function):
    """Autograd of a planned call: what `_register.py` registers, without lists of tensors.

    torch flattens and rebuilds such lists in Python, which takes longer than a small call.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        with AutoDispatchBelowAutograd():
            out, lse = plan.operator(*plan.arguments(tensors))
        ctx.save_for_backward(*tensors, out, lse)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[1 : 1 + N_DIFFERENTIABLE]
        dout, dlse = output_gradients(dout, dlse, out, lse)
        arguments = (dout, dlse, *ctx.plan.arguments(tensors), out, lse, needs_grad)
        operator = NATIVE.rel_attention_bwd.default
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or "cpu" in verification.DEVICE_TYPES
            or is_changed()
        ):
            grads = operator(*arguments)
        else:
            with AutoDispatchBelowAutograd():
                grads = operator(*arguments)
        result = (x if needed else None for x, needed in zip(grads, needs_grad, strict=True))
        return None, *result, *[None] * (len(tensors) - N_DIFFERENTIABLE)


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
    if (
        torch.compiler.is_compiling()
        or bias is not None
        or "cpu" in verification.DEVICE_TYPES
        or is_changed()
    ):
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


def get(key: tuple[Any, ...] | None) -> Plan | None:
    """The plan of an earlier call with this key."""
    return None if key is None else _plans.get(key)


def add(key: tuple[Any, ...] | None, prepared: Prepared) -> Plan | None:
    """Keeps and returns the plan of a call to the native backend; None if it cannot have one.

    A call has none if its mask had to be expanded or its dropout seed drawn.
    """
    call = prepared.call
    if key is None or prepared.backend != "native" or call.numbers.dropout_p > 0:
        return None
    if call.optional.mask is not None:
        return None
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    with torch.inference_mode(False):
        absent = torch.empty(0, dtype=call.q.dtype, device="cpu")
    has_optional = any(x is not None for x in call.optional)
    plan = Plan(
        NATIVE.rel_attention_fwd.default,
        absent,
        None if has_optional else [absent] * len(call.optional),
        list(call.rules),
        list(call.numbers),
        needs_grad=key[-1],
    )
    _plans[key] = plan
    return plan


def clear() -> None:
    """Forgets all plans."""
    _plans.clear()
