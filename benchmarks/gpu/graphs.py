"""Stage "graphs": calls captured in a CUDA graph give, replayed on new inputs, the call's bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import adaptive, attention, device
from benchmarks.gpu.attention import DECODE, OURS, TRAIN
from benchmarks.inputs import AttentionShape
from benchmarks.softmax_inputs import SoftmaxInputs, SoftmaxShape
from txl_kernels import adaptive_embedding

Results = dict[str, Tensor]
Call = Callable[[], Results]
# Runs a call once and gives what replays it, and the tensors that hold a replay's results.
Capture = Callable[[Call], tuple[Callable[[], None], Results]]

LOOSE = 1e-2  # relative error that atomic sums may leave in what is not the same bits twice


@dataclasses.dataclass(frozen=True)
class Case:
    """A call bound to `inputs`, and `others` to copy into their place before the replay.

    Attributes:
        loose: results whose sums are atomic, which may differ in their last bits.
        deterministic: it runs under `torch.use_deterministic_algorithms`.
    """

    call: Call
    inputs: list[Tensor]
    others: list[Tensor]
    loose: tuple[str, ...] = ()
    deterministic: bool = False


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Results: per call, which of its tensors a replay gave wrong, or what it raised.

    Raises:
        UnavailableError: no CUDA device; by then every call has been made once, small, on the CPU.
        AssertionError: a replay differed, or could not be.
    """
    if not torch.cuda.is_available():
        results["rehearsal"] = rehearse()
        save()
    gpu = device.require()
    for name, make in cases(TRAIN, DECODE, adaptive.WT103_LARGE, gpu):
        try:
            results[name] = differences(make(), capture)
        except Exception as error:
            results[name] = [f"{type(error).__name__}: {error}"]
        save()
    wrong = {name: differ for name, differ in results.items() if differ}
    assert not wrong, f"a captured graph replays to other results: {wrong}"


def rehearse() -> dict[str, str]:
    """Each call once on the CPU, small, where making it again stands for a replay."""
    train = [dataclasses.replace(x, B=1, H=2, Tq=16, Tm=16, D=16) for x in TRAIN]
    decode = dataclasses.replace(DECODE, B=2, H=2, Tm=24, D=16)
    said = {}
    for name, make in cases(train, decode, adaptive.WT103_LARGE.tiny(), torch.device("cpu")):
        try:
            differ = differences(make(), again)
            said[name] = f"other results: {', '.join(differ)}" if differ else "it ran"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return said


def cases(
    train: tuple[AttentionShape, ...] | list[AttentionShape],
    decode: AttentionShape,
    softmax: SoftmaxShape,
    where: torch.device,
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """By name what makes each; its tensors live no longer than it does."""
    for shape in (*train, decode):
        yield f"{shape.name}/forward", functools.partial(_forward, shape, where)
    for shape in train:
        for deterministic in (True, False):
            kind = "deterministic" if deterministic else "default"
            make = functools.partial(_forward_backward, shape, where, deterministic)
            yield f"{shape.name}/forward+backward/{kind}", make
    for op in adaptive.OPS:
        yield f"{op}/forward+backward", functools.partial(_softmax, op, softmax, where)
    yield "adaptive_embedding/forward+backward", functools.partial(_embedding, softmax, where)


def differences(case: Case, capture: Capture) -> list[str]:
    """Results that a replay on other inputs gives unlike the call itself on them."""
    torch.use_deterministic_algorithms(case.deterministic)
    try:
        replay, found = capture(case.call)
        with torch.no_grad():
            for tensor, other in zip(case.inputs, case.others, strict=True):
                tensor.copy_(other)
        replay()
        right = case.call()
    finally:
        torch.use_deterministic_algorithms(False)
    return [name for name in right if not _same(found[name], right[name], name in case.loose)]


def capture(call: Call) -> tuple[Callable[[], None], Results]:
    """In a CUDA graph, behind runs on a stream of their own that compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay, found


def again(call: Call) -> tuple[Callable[[], None], Results]:
    """`capture` where there is no GPU: the call is made again, into the same tensors."""
    found = {name: x.detach().clone() for name, x in call().items()}

    def replay() -> None:
        for name, x in call().items():
            found[name].copy_(x.detach())

    return replay, found


def _forward(shape: AttentionShape, where: torch.device) -> Case:
    inputs, others = (
        attention.inputs_on(shape, where, requires_grad=False, seed=seed) for seed in (0, 1)
    )
    attend, leaves = attention.bind(OURS, shape, inputs)

    @torch.no_grad()
    def call() -> Results:
        return {"out": attend()}

    return Case(call, leaves, list(others.leaves()))


def _forward_backward(shape: AttentionShape, where: torch.device, deterministic: bool) -> Case:
    inputs, others = (
        attention.inputs_on(shape, where, requires_grad=True, seed=seed) for seed in (0, 1)
    )
    attend, leaves = attention.bind(OURS, shape, inputs)
    names = [f"d{name}" for name, x in inputs._asdict().items() if x is not None]
    dout, other_dout = torch.randn_like(inputs.q), torch.randn_like(inputs.q)

    def call() -> Results:
        out = attend()
        grads = torch.autograd.grad(out, leaves, dout)
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    loose = () if deterministic else ("dr",)
    return Case(call, [*leaves, dout], [*others.leaves(), other_dout], loose, deterministic)


def _softmax(op: str, shape: SoftmaxShape, where: torch.device) -> Case:
    inputs, others = _softmax_inputs(shape, where)
    loss, leaves = adaptive.ours(op, shape, inputs), inputs.leaves()

    def call() -> Results:
        value = loss()
        grads = torch.autograd.grad(value, list(leaves.values()))
        named = zip((f"d{name}" for name in leaves), grads, strict=True)
        return {"loss": value.detach(), **dict(named)}

    return Case(call, [*leaves.values(), inputs.target], [*others.leaves().values(), others.target])


def _embedding(shape: SoftmaxShape, where: torch.device) -> Case:
    """Its tables are the softmax's weights, its tokens the targets."""
    both = _softmax_inputs(shape, where)
    sets = []
    for turn, x in enumerate(both):
        tables = [x.head_weight[: shape.sizes[0]], *x.tail_weights]
        parts = [*tables, *(projection.mT for projection in x.projections)]
        leaves = [part.detach().contiguous().requires_grad_() for part in parts]
        sets.append([*leaves, torch.randn_like(x.hidden).roll(turn), x.target])
    (*leaves, dout, tokens), others = sets
    n = len(shape.sizes)

    def call() -> Results:
        out = adaptive_embedding(
            tokens, leaves[:n], [None, *leaves[n:]], shape.cutoffs, scale=shape.d**0.5
        )
        grads = torch.autograd.grad(out, leaves, dout)
        named = {f"dtable[{k}]" if k < n else f"dprojection[{k - n}]": x for k, x in
                 enumerate(grads)}  # fmt: skip
        return {"out": out.detach(), **named}

    return Case(call, sets[0], others)


def _softmax_inputs(shape: SoftmaxShape, where: torch.device) -> tuple[SoftmaxInputs, ...]:
    return tuple(adaptive.inputs_on(shape, where, torch.bfloat16, turn=turn) for turn in range(2))


def _same(found: Tensor, right: Tensor, loose: bool) -> bool:
    """Bit by bit; by the norm where that cannot be."""
    if not loose or not bool(found.isfinite().all()):
        return torch.equal(found, right)
    error = (found.float() - right.float()).norm() / right.float().norm()
    return float(error) <= LOOSE
