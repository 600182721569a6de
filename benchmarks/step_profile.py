"""Where our training step spends its time: products, attention, and what stands beside them."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cases.model import ModelShape, Run

STEP = "training step"
HOST = "host (Python, autograd, dispatch)"
REST = "other elementwise and copies"

# What an operation belongs to, by the first pattern that it, its callers, or the forward operation
# that it is the backward of matches.
PARTS = {
    "attention kernel": r"txl_native::|RelAttention",
    "optimizer and clipping": r"Optimizer\.|clip|_foreach_|_fused_adam|linalg_vector_norm",
    "GEMMs of linear layers": r"^aten::(mm|addmm|bmm|baddbmm)$|mkldnn_linear|onednn",
    "dropout": r"^aten::(dropout|bernoulli_|native_dropout)",
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
    forward_parts = {
        event.sequence_nr: part
        for event in events
        if event.sequence_nr >= 0 and not _is_backward(event)
        for part in [_part(event, {})]
        if part != REST
    }
    ms: dict[str, float] = defaultdict(float)
    for event in events:
        ms[_part(event, forward_parts)] += event.self_cpu_time_total / 1e3 / steps
    total = sum(ms.values())
    ordered = sorted(ms.items(), key=lambda item: -item[1])
    return [Share(part, time, time / total) for part, time in ordered]


def _part(event: FunctionEvent, forward_parts: dict[int, str]) -> str:
    """The part that an event's own time (without the events below it) belongs to."""
    if event.name == STEP or _is_backward(event) or event.name.endswith("Backward0"):
        return HOST
    at: FunctionEvent | None = event
    while at is not None:
        for part, pattern in PARTS.items():
            if re.search(pattern, at.name):
                return part
        if _is_backward(at) and at.sequence_nr in forward_parts:
            return forward_parts[at.sequence_nr]
        at = at.cpu_parent
    return REST


def _is_backward(event: FunctionEvent) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")
