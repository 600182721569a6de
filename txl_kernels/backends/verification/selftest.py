"""The self-test: runs a problem three times and compares it with float64 and eager PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from txl_kernels._register_adaptive import is_present
from txl_kernels.backends.reference import adaptive_embedding, adaptive_softmax
from txl_kernels.backends.reference import rel_attention as attention
from txl_kernels.backends.reference.rel_shift import rel_shift
from txl_kernels.backends.verification.calls import Description, Spec, replaced, specs
from txl_kernels.backends.verification.kernels import empty, layouts
from txl_kernels.testing.budget import check_budget

_Result = TypeVar("_Result")
# Names of the tensors of `rel_attention`, in the order of its schema, and of its numbers.
_TENSORS = (
    *("q", "k", "v", "r", "r_w_bias", "r_r_bias", "mem_k", "mem_v", "q_pos"),
    *("key_start", "key_lens", "mask", "bias", "dropout_seed"),
)
_NUMBERS = (
    *("offset", "clamp", "causal", "window_left", "window_right", "chunk"),
    *("scale", "softcap", "dropout_p", "dead_uniform"),
)


class _Results(NamedTuple):
    """Outputs and requested gradients of one run."""

    outputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


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
    dout = _dout(call, arguments, device)
    douts = layouts(dout) if call.op == "rel_attention" and dout is not None else (dout,)
    first = _run(call, arguments, dout)
    _check_budgets(call, arguments, dout, first)
    names = [f"output {n}" for n in range(len(first.outputs))] + _gradient_names(call)
    for n in (1, 2):
        again = _run(call, arguments, douts[n % len(douts)])
        pairs = zip(names, sum(first, ()), sum(again, ()), strict=True)
        for name, x, y in pairs:
            if name == "dr" and not call.deterministic:
                continue
            same = torch.equal(_bits(x), _bits(y))
            assert same, f"{call.label}: two runs differ in the bits of {name}"


def _bits(x: Tensor) -> Tensor:
    x = x.to_dense() if x.is_sparse else x
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


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
        Tk = arguments[1].shape[2] + (0 if arguments[6] is None else arguments[6].shape[2])
        for n, first in ((9, 0), (10, (Tk + 1) // 2)):  # at least one key is left
            if arguments[n] is not None:
                arguments[n].remainder_(max((Tk + 1) // 2, 1)).add_(first)
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


def _leaves(arguments: Any) -> list[Tensor]:
    """The tensors whose gradients are requested, in order."""
    flat: list[Tensor] = []
    for value in arguments:
        if isinstance(value, Tensor) and value.requires_grad:
            flat.append(value)
        elif isinstance(value, list):
            flat += _leaves(value)
    return flat


def _gradient_names(call: Description) -> list[str]:
    if call.op == "rel_attention":
        pairs = zip(_TENSORS, call.arguments, strict=False)
        return [f"d{name}" for name, spec in pairs if spec is not None and spec.requested]
    n = sum(spec.requested for spec in specs(call.arguments))
    return [f"gradient {position}" for position in range(n)]


def _dout(call: Description, arguments: Sequence[Any], device: torch.device) -> Tensor | None:
    """A random gradient of the first output, or None where no gradient is requested."""
    if not call.needs_backward:
        return None
    with torch.no_grad():
        out = _reference(call.op, arguments, None)[0]
    generator = torch.Generator(device).manual_seed(2019)
    return torch.randn(out.shape, generator=generator, device=device).to(out.dtype)


def _run(call: Description, arguments: Sequence[Any], dout: Tensor | None) -> _Results:
    """One run of the operator, with gradients if any is requested."""
    operator = getattr(getattr(torch.ops, f"txl_{call.backend}"), f"{call.op}_fwd")
    found = operator(*arguments)
    outputs = (found,) if isinstance(found, Tensor) else found
    outputs = tuple(x for x in outputs if isinstance(x, Tensor))
    if call.op.startswith("adaptive"):
        outputs = outputs[:1]  # lse is for backward
    return _with_gradients(outputs, _leaves(arguments), dout)


def _with_gradients(
    outputs: tuple[Tensor, ...], leaves: Sequence[Tensor], dout: Tensor | None
) -> _Results:
    grads: tuple[Tensor, ...] = ()
    if dout is not None:
        grads = torch.autograd.grad(outputs[0], leaves, dout.to(outputs[0].dtype))
    return _Results(tuple(x.detach() for x in outputs), grads)


def _reference(op: str, arguments: Sequence[Any], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """The specification in `dtype`, or in its usual one."""
    if op == "rel_attention":
        named = dict(zip((*_TENSORS, *_NUMBERS), arguments, strict=True))
        chunk = named["chunk"]
        named["chunk"] = chunk if chunk and chunk[0] else ()
        q, k, v, r = (named.pop(name) for name in "qkvr")
        return attention.rel_attention(q, k, v, r, **named, compute_dtype=dtype)
    if op == "rel_shift":
        return (rel_shift(*arguments),)
    if op == "adaptive_embedding":
        tokens, tables, projections, scale, _sparse = arguments
        given = [x if is_present(x) else None for x in projections]
        return (adaptive_embedding.embed(tokens, tables, given, scale, compute_dtype=dtype),)
    hidden, target, flat, ignore_index, *_ = arguments
    parts: list[Any] = [x if is_present(x) else None for x in flat]
    head, *tails = (adaptive_softmax.Cluster(*parts[n : n + 3]) for n in range(0, len(parts), 3))
    nll = adaptive_softmax.nll(hidden, target, head, tails, ignore_index, compute_dtype=dtype)
    if op == "adaptive_nll":
        return (nll,)
    reduction = "mean" if arguments[4] else "sum"
    return (adaptive_softmax.reduced(nll, target, ignore_index, reduction),)


def _as_double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return [_as_double(part) for part in value] if isinstance(value, list) else value


def _check_budgets(
    call: Description, arguments: list[Any], dout: Tensor | None, actual: _Results
) -> None:
    dtype = next(x.dtype for x in specs(call.arguments) if x.dtype.is_floating_point)
    exact = [_as_double(value) for value in arguments]
    ref64 = _with_gradients(_reference(call.op, exact, torch.float64), _leaves(exact), dout)
    eager = _with_gradients(_reference(call.op, arguments, dtype), _leaves(arguments), dout)
    for n, tensors in enumerate(zip(actual.outputs, ref64.outputs, eager.outputs, strict=True)):
        check_budget(f"{call.label}: output {n}", *tensors, dtype=dtype)
    if dout is None:
        return
    magnitudes = _magnitudes(call, arguments, dout)
    grads = zip(actual.grads, ref64.grads, eager.grads, strict=True)
    for name, tensors in zip(_gradient_names(call), grads, strict=True):
        dense = (x.to_dense() if x.is_sparse else x for x in tensors)
        is_sum = call.op.startswith("adaptive") or name in ("dr", "dr_w_bias", "dr_r_bias")
        check_budget(
            f"{call.label}: {name}",
            *dense,
            dtype=dtype,
            magnitude=magnitudes.get(name, magnitudes.get("")),
            is_sum=is_sum,
        )


def _magnitudes(call: Description, arguments: Sequence[Any], dout: Tensor) -> Mapping[str, float]:
    """The largest product of magnitudes that enters each gradient; "" stands for all of them."""
    largest = float(dout.abs().max())
    if call.op == "rel_attention":
        from txl_kernels.testing.rel_attention import gradient_magnitudes

        named = dict(zip((*_TENSORS, *_NUMBERS), arguments, strict=True))
        floats = {
            name: x for name, x in named.items() if isinstance(x, Tensor) and x.is_floating_point()
        }
        return gradient_magnitudes(floats, dout, named)
    if call.op == "rel_shift":
        return {"": largest}
    leaf = max(float(x.detach().abs().max()) for x in _leaves(arguments) if x.numel() > 0)
    if call.op == "adaptive_embedding":
        return {"": largest * abs(arguments[3]) * leaf}
    if call.op == "adaptive_loss" and arguments[4]:
        counted = int((arguments[1] != arguments[3]).sum())
        return {"": largest * leaf / max(counted, 1)}
    return {"": largest * leaf}
