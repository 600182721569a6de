"""The self-test: runs a problem three times and compares it with float64 and eager PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from txl_kernels._namespaces import NATIVE, TRITON
from txl_kernels._rel_attention_call import AXES, RelAttentionCall
from txl_kernels.backends.verification.calls import Description, Spec, replaced
from txl_kernels.backends.verification.kernels import empty, layouts
from txl_kernels.testing.comparison import check_results, random_like, reference, repeated

_Result = TypeVar("_Result")


def in_clean_thread(function: Callable[[], _Result], device: torch.device) -> _Result:
    """The function's result, from a thread of its own, which has torch's default state.

    Gradient mode, autocast, transforms, traces, fake tensors, the default device, the current
    device and the current stream belong to a thread: the caller's stay as they are. Backward
    passes run in the same thread too, where the limit of `kernels.limited` is set.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            with torch.autograd.set_multithreading_enabled(False):
                results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="txl_kernels self-test")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def check(call: Description, device: torch.device) -> None:
    """Runs the call three times with random values.

    Results must be within the error budget, gradients included, and the same in every run.
    Gradients of r are compared between runs only if torch's algorithms are set to be
    deterministic: the kernels add to them in any order otherwise.

    Raises:
        AssertionError: an error over budget, NaN, or different bits.
        Exception: the kernel does not compile or does not run.
    """
    arguments = _values(call, device)
    operator = _operator(call)
    dout = dlse = None
    douts: list[Tensor | None] = [None] * 3
    if call.needs_backward:
        with torch.no_grad():
            found = reference(call.op, arguments)
        dout = random_like(found if isinstance(found, Tensor) else found[0])
        first, other = dout, dout
        if call.op == "rel_attention":
            first, other = layouts(dout)
            dlse = random_like(found[1])
        douts = [first, other, first]
    unordered = () if call.deterministic else ("dr",)
    run = partial(repeated, call.label, call.op, arguments, lambda x: operator(*x))
    actual = run(douts, unordered=unordered)
    check_results(call.label, call.op, arguments, actual, dout)
    if dlse is not None:
        actual = run(douts[:1], dlse=dlse)
        check_results(call.label, call.op, arguments, actual, dout, dlse)


def _operator(call: Description) -> Any:
    operators = NATIVE if call.backend == "native" else TRITON
    return {
        "rel_attention": operators.rel_attention_fwd,
        "rel_shift": operators.rel_shift_fwd,
        "adaptive_nll": operators.adaptive_nll_fwd,
        "adaptive_loss": operators.adaptive_loss_fwd,
        "adaptive_embedding": operators.adaptive_embedding_fwd,
    }[call.op]


def _values(call: Description, device: torch.device) -> list[Any]:
    """Random tensors from a generator of their own; floating ones with variance near 1."""
    generator = torch.Generator(device).manual_seed(1914)
    widths_matter = call.op.startswith("adaptive")

    def random(spec: Spec) -> Tensor:
        x = empty(spec, device)
        # An axis of stride 0 repeats one value.
        pairs = zip(spec.shape, spec.strides, strict=True)
        shape = [1 if stride == 0 else size for size, stride in pairs]
        place = x.as_strided(shape, x.stride(), x.storage_offset())
        if spec.dtype.is_floating_point:
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            place.copy_(drawn / spec.shape[-1] ** 0.5 if widths_matter and shape else drawn)
        elif spec.dtype == torch.bool:
            place.copy_(torch.rand(shape, generator=generator, device=device) > 0.3)
        else:
            high = 2**31
            place.copy_(torch.randint(0, high, shape, generator=generator, device=device))
        return x.requires_grad_(spec.requested)

    arguments: list[Any] = replaced(call.arguments, random)
    if call.op == "rel_attention":
        given = RelAttentionCall.of_arguments(*arguments)
        optional, Tm = given.optional, 0
        if optional.mem_k is not None:
            Tm = optional.mem_k.shape[2]
        half = (Tm + given.k.shape[2] + 1) // 2
        for name, axes in AXES.items():
            positions = getattr(optional, name)
            if positions is not None and axes in ("B", "BT"):
                # At least one key is left to queries without other rules.
                positions.remainder_(max(half, 1)).add_(0 if name == "key_start" else half)
    elif call.op == "adaptive_embedding":
        _spread(arguments[0], [len(table) for table in arguments[1]])
    elif call.op.startswith("adaptive"):
        _, target, clusters, ignore_index, *_ = arguments
        weights = clusters[1::3]
        c0 = len(weights[0]) - len(weights) + 1
        _spread(target, [c0, *map(len, weights[1:])])
        target[-1:] = ignore_index
    if call.op == "adaptive_loss":  # without the flag of `is_one_table`
        arguments[5] = arguments[5][: 1 + len(arguments[2])]
    return arguments


def _spread(tokens: Tensor, sizes: Sequence[int]) -> None:
    """Brings random numbers into [0, V) in place, so that every cluster has tokens."""
    cluster = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape) % len(sizes)
    size = torch.tensor(sizes, device=tokens.device)
    first = size.cumsum(0) - size
    tokens.remainder_(size[cluster]).add_(first[cluster])
