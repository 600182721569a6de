"""Where our training step spends its time: products, attention, and what stands beside them."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cases.model import ModelShape, Run

STEP = "training step"
NODE = "autograd::engine::evaluate_function"
HOST = "host (Python, autograd, dispatch)"
REST = "other elementwise and copies"

# What an operation belongs to, by the first pattern that it, its callers, or the forward operation
# that it is the backward of matches.
PARTS = {
    "attention kernel": r"txl_native",
    "optimizer and clipping": r"Optimizer\.|clip|_foreach_|_fused_adam|linalg_vector_norm",
    "linear layers: GEMMs, bias sums": r"^aten::(mm|addmm|bmm|baddbmm)$|mkldnn_linear|onednn",
    "dropout": r"^aten::(dropout|bernoulli_|random_|native_dropout)",
    "LayerNorm": r"layer_norm|LayerNorm",
    "softmax and loss": r"softmax|LogSoftmax|logsumexp|nll_loss|cross_entropy|gather",
    "embedding": r"embedding|Embedding|index_select|index_add",
    "feed-forward's ReLU": r"relu|threshold|Relu|Threshold",
}


@dataclasses.dataclass(frozen=True)
class Share:
    """A part of the step: ms per step, and of the whole."""

    part: str
    ms: float
    share: float


def profile_step(shape: ModelShape, dtype: torch.dtype, *, steps: int = 3) -> list[Share]:
    """The parts of a training step of `shape`, largest first; they add up to all of it.

    The profiler's own cost falls on the host's share.
    """
    run = Run(shape, dtype, "auto")
    for _ in range(2):
        run.train_step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            with record_function(STEP):
                run.train_step()
    return shares(recorded.events(), steps)


def shares(events: Iterable[FunctionEvent], steps: int) -> list[Share]:
    """The profiler's events, put together by part."""
    events = list(events)
    # A backward node bears the number of the forward operation that it differentiates.
    forward_parts = {
        event.sequence_nr: _part(event, {})
        for event in events
        if event.sequence_nr >= 0 and not _in_backward(event)
    }
    ms: dict[str, float] = defaultdict(float)
    for event in events:
        ms[_part(event, forward_parts)] += event.self_cpu_time_total / 1e3 / steps
    total = sum(ms.values())
    ordered = sorted(ms.items(), key=lambda item: -item[1])
    return [Share(part, time, time / total) for part, time in ordered]


def _part(event: FunctionEvent, forward_parts: Mapping[int, str]) -> str:
    """The part that an event's own time (without the events below it) belongs to."""
    if event.name == STEP or event.name.startswith(NODE):
        return HOST
    for caller in _with_callers(event):
        for part, pattern in PARTS.items():
            if re.search(pattern, caller.name):
                return part
        if caller.name.startswith(NODE):
            return forward_parts.get(caller.sequence_nr, REST)
    return REST


def _in_backward(event: FunctionEvent) -> bool:
    return any(caller.name.startswith(NODE) for caller in _with_callers(event))


def _with_callers(event: FunctionEvent) -> Iterator[FunctionEvent]:
    at: FunctionEvent | None = event
    while at is not None:
        yield at
        at = at.cpu_parent
