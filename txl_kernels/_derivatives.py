"""How torch differentiates and batches the custom ops: shared by the registrations of all ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from txl_kernels._namespaces import backend_of
from txl_kernels.errors import BackendUnavailableError
from txl_kernels.torch_private import (
    is_legacy_batched,
    legacy_batched,
    legacy_level,
    legacy_unbatched,
    tree_map,
)
from txl_kernels.transforms import kernel_refusal

_Grad = TypeVar("_Grad", Tensor, Tensor | None)


def register_autograd(
    operator: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None
) -> None:
    """`torch.library.register_autograd`, but an error inside the transforms that it lacks.

    torch alone would return tangents of 0, or fail with a message about its own internals.

    Args:
        operator: "namespace::name".
        backward, setup_context: as `torch.library.register_autograd` takes them.
    """
    library = _library(operator.partition("::")[0])
    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=library)


def register_vmap(operator: str, call: Callable[..., Any]) -> None:
    """Registers a batching rule that calls the operator once per element of the batch.

    torch has a loop of its own only for operators without lists of tensors.

    Args:
        operator: "namespace::name".
        call: the operator itself.
    """
    name = operator.partition("::")[2]

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"{name}: torch.vmap needs at least one element, got a batch of 0")
        stacked = _looped(call, args, in_dims, info.batch_size)
        return stacked, tree_map(lambda _: 0, stacked)

    torch.library.register_vmap(operator, one_by_one)


def loop_over_batched_gradients(operator: str, call: Callable[..., Any]) -> None:
    """Lets `torch.autograd.grad(is_grads_batched=True)` call a backward operator per gradient.

    It batches with an older vmap than `torch.vmap`, which has no loop for lists of tensors.

    Args:
        operator: "namespace::name".
        call: the operator itself.
    """

    def one_by_one(*args: Any) -> Any:
        level = legacy_level()
        sizes: list[int] = []

        def whole(x: Any) -> Any:
            if is_legacy_batched(x):
                x = legacy_unbatched(x, level)
                sizes.append(len(x))
            return x

        in_dims = tree_map(lambda x: 0 if is_legacy_batched(x) else None, args)
        unbatched = tree_map(whole, args)
        stacked = _looped(call, unbatched, in_dims, sizes[0])
        return tree_map(lambda x: legacy_batched(x, level), stacked)

    torch.library.impl(operator, "Batched", one_by_one)


def refuse_batched_gradients(operator: str) -> None:
    """Makes `torch.autograd.grad(is_grads_batched=True)` a clear error for a backward operator.

    It batches with an older vmap than `torch.vmap`, which has no loop for lists of tensors.
    """
    namespace, _, name = operator.partition("::")
    op, backend = name.removesuffix("_bwd"), backend_of(namespace)

    def refuse(*_: Any) -> NoReturn:
        raise BackendUnavailableError(
            f"{op}: {backend} supports no batch of gradients (torch.autograd.grad with "
            'is_grads_batched=True, jacobian with vectorize=True): pass backend="reference"'
        )

    torch.library.impl(operator, "Batched", refuse)


def refuse_second_derivative(operator: str) -> None:
    """Makes differentiating a backward operator an error; torch alone would only warn."""
    op = operator.partition("::")[2].removesuffix("_bwd")

    def backward(*_: Any) -> NoReturn:
        raise RuntimeError(no_second_derivative(op))

    register_autograd(operator, backward)


def without_derivative(
    op: str, grads: Sequence[_Grad], inputs: Sequence[Tensor | None] = ()
) -> list[_Grad]:
    """The gradients, as they are; if torch records a graph of them, differentiating it raises.

    Args:
        op: the op that the error names.
        grads: None where a gradient was not requested.
        inputs: tensors that the gradients depend on.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    leaves = [grad.requires_grad_() for grad in grads if grad is not None]
    guarded = iter(
        _NoSecondDerivative.apply(op, len(inputs), *inputs, *leaves)  # type: ignore[no-untyped-call]
    )
    return [grad if grad is None else next(guarded) for grad in grads]


def no_second_derivative(op: str) -> str:
    """The message of the error."""
    return f'{op}: no second derivative exists on this backend; backend="reference" has one'


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on gradients; differentiating it is an error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, op: str, n_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors after the first `n_inputs`, which only connect the graph to them."""
        ctx.op = op
        return tuple(grad.view_as(grad) for grad in tensors[n_inputs:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(no_second_derivative(ctx.op))


def _looped(
    call: Callable[..., Any], args: Sequence[Any], in_dims: Sequence[Any], batch_size: int
) -> Any:
    """The results of one call per element of the batch, stacked."""
    results = [
        call(*(_element(x, dim, n) for x, dim in zip(args, in_dims, strict=True)))
        for n in range(batch_size)
    ]
    return tree_map(lambda *parts: torch.stack(parts), *results)


def _element(x: Any, dim: Any, n: int) -> Any:
    """Element n of an argument that has its batch at `dim` (None: none), or of each in a list."""
    if isinstance(dim, (list, tuple)):
        return [_element(part, part_dim, n) for part, part_dim in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, n)


class _Library(torch.library.Library):
    """Registers autograd kernels that first check which transforms they run inside."""

    def impl(self, op_name: str, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        op, backend = op_name.rpartition("_")[0], backend_of(self.ns)

        def checked(*args: Any, **kwargs: Any) -> Any:
            reason = kernel_refusal(backend)
            if reason is not None:
                raise BackendUnavailableError(f"{op}: {reason}")
            return fn(*args, **kwargs)

        super().impl(op_name, checked, dispatch_key, **options)  # type: ignore[no-untyped-call]


@functools.cache
def _library(namespace: str) -> _Library:
    """Kept for the life of the process: a library that is collected takes its kernels with it."""
    return _Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
