"""The hashes of the kernels that a call launches, without running or compiling them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from txl_kernels._rel_attention_call import N_DIFFERENTIABLE
from txl_kernels.backends import native
from txl_kernels.backends.verification.calls import Description, Spec, key, replaced


def hashes(
    call: Description, device: torch.device, limit: int | None = None
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """{hash: label} of the kernels of the forward pass, and of those of the backward pass.

    A kernel in the native library is compiled with it: its hash is that of the library, with the
    specialisation.

    Args:
        limit: see `calls.problems`.
    """
    if call.backend == "triton":
        with limited(limit):
            return _triton_hashes(call, device)
    plain = tuple(replaced(call.arguments, lambda spec: spec._replace(requested=False)))
    forward = _native_hash(call._replace(arguments=plain), "forward")
    return forward, _native_hash(call, "backward") if call.needs_backward else {}


def _native_hash(call: Description, direction: str) -> Mapping[str, str]:
    parts = repr((library_hash(), direction, key(call)))
    return {hashlib.sha256(parts.encode()).hexdigest()[:32]: f"{call.label}/{direction}"}


@functools.cache
def library_hash() -> str:
    """The hash of the native library, with all kernels that were compiled into it."""
    return hashlib.sha256(native.library_path().read_bytes()).hexdigest()


@contextlib.contextmanager
def limited(limit: int | None) -> Iterator[None]:
    """Within it this thread's adaptive softmax holds at most `limit` logits, if one is given."""
    if limit is None:
        yield
        return
    from txl_kernels.backends.triton import adaptive_softmax_head as head

    before = head.limit.logits
    head.limit.logits = limit
    try:
        yield
    finally:
        head.limit.logits = before


def _triton_hashes(
    call: Description, device: torch.device
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    from txl_kernels.backends.triton import launching

    arguments = replaced(call.arguments, empty)
    with torch.no_grad(), launching.recording(launching.current_target(), device) as launches:
        outputs = _kernels(call.op)[0](*arguments)
        n_forward = len(launches)
        if call.needs_backward:
            _record_backward(call, arguments, outputs)
    forward, backward = (
        {
            launching.kernel_hash(launch): f"{call.label}/{direction}/{launch.kernel.__name__}"
            for launch in part
        }
        for part, direction in (
            (launches[:n_forward], "forward"),
            (launches[n_forward:], "backward"),
        )
    )
    return forward, backward


def empty(spec: Spec, device: torch.device | str = "meta") -> Tensor:
    """A tensor that the description describes, with undefined values."""
    pairs = zip(spec.shape, spec.strides, strict=True)
    n = spec.offset + 1 + sum((size - 1) * stride for size, stride in pairs)
    memory = torch.empty(max(n, 1), dtype=spec.dtype, device=device)
    return memory.as_strided(spec.shape, spec.strides, spec.offset)


def layouts(dout: Tensor) -> tuple[Tensor, ...]:
    """The gradient of the output of `rel_attention` in the memory orders that models produce.

    [B, H, Tq, Dv] and [B, Tq, H, Dv]; backward kernels are specialised by its strides.
    """
    return dout, dout.transpose(1, 2).contiguous().transpose(1, 2)


def _kernels(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The Triton kernels of the forward and of the backward pass."""
    from txl_kernels.backends.triton import kernels

    return {
        "rel_attention": (kernels.rel_attention_fwd, kernels.rel_attention_bwd),
        "rel_shift": (kernels.rel_shift_fwd, kernels.rel_shift_bwd),
        "adaptive_nll": (kernels.adaptive_nll_fwd, kernels.adaptive_nll_bwd),
        "adaptive_loss": (kernels.adaptive_loss_fwd, kernels.adaptive_loss_bwd),
        "adaptive_embedding": (kernels.adaptive_embedding_fwd, kernels.adaptive_embedding_bwd),
    }[op]


def _record_backward(call: Description, arguments: Sequence[Any], outputs: Any) -> None:
    run = _kernels(call.op)[1]
    given = call.arguments

    def requested(specs: Sequence[Spec]) -> list[bool]:
        return [spec.requested for spec in specs]

    if call.op == "rel_attention":
        needs_grad = requested([*given[:4], *given[4]])[:N_DIFFERENTIABLE]
        out, lse = outputs
        for dout in layouts(torch.empty_like(out, memory_format=torch.contiguous_format)):
            for dlse in (lse.new_empty(0), torch.empty_like(lse)):
                run(dout, dlse, *arguments, out, lse, needs_grad)
    elif call.op == "rel_shift":
        run(outputs, given[0].shape[-1], arguments[2])
    elif call.op == "adaptive_nll":
        needs_grad = requested([given[0], *given[2]])
        run(outputs[0], *arguments, outputs[1], needs_grad)
    elif call.op == "adaptive_loss":
        run(outputs[0], outputs[1])
    else:
        run(outputs, *arguments, requested([*given[1], *given[2]]))
