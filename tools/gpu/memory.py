"""Stage "memory": a training step replayed as a CUDA graph, and peak memory of headline calls."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector

from benchmarks import headline
from benchmarks.cases import OURS
from benchmarks.cases.adaptive_softmax import SoftmaxCase
from benchmarks.cases.rel_attention import COMPILED_PEERS, AttentionCase
from benchmarks.device import peak_mib
from benchmarks.suite import Figures, noting
from tools.gpu.runner import Context
from transformer_xl.config import ModelConfig
from transformer_xl.model import TransformerXL

SHAPES = (*headline.TRAIN, headline.PARAKEET, *headline.INKLING[:2])
SIZES = {"n_layer": 2, "d_model": 128, "n_head": 2, "d_inner": 256, "mem_len": 64}
MODEL = ModelConfig(vocab_size=1000, cutoffs=(200, 500), div_val=2, dropout=0.0, **SIZES)
B, T = 4, 64
TOLERANCE = 1e-4  # of the change of the parameters; sums for r's gradient are atomic
Step = Callable[[], None]


def run(context: Context) -> None:
    """Results: "graph_difference", the relative difference that the replay makes to the change of
    the parameters; by call, the peak "mib" of forward and backward by contender."""
    difference = context.results["graph_difference"] = graph_difference(context.device)
    line = f"a replayed training step differs by {difference:.1e}"
    context.results["summary"] = [line]
    assert difference <= TOLERANCE, line
    dtype, device = torch.bfloat16, context.device.type
    cases: list[Any] = [AttentionCase(x, dtype, "forward+backward", device) for x in SHAPES]
    cases.append(SoftmaxCase(headline.SOFTMAX, dtype, "loss", device))
    for case in [case.tiny() for case in cases] if context.is_rehearsal else cases:
        figures = Figures(case.name)
        for name in (OURS, *case.peers, *case.yardsticks):
            if context.seconds_left() < 1 or name in COMPILED_PEERS:
                continue
            with noting(figures, name), case.contender(name) as timed:
                figures.peak_mib[name] = peak_mib(timed)
            gc.collect()
        context.results[case.shape.name] = {"mib": figures.peak_mib, "notes": figures.notes}
        line = ", ".join(f"{name} {mib:.0f}" for name, mib in figures.peak_mib.items())
        context.results["summary"].append(f"{case.shape.name:<20} MiB: {line}")
        context.save()


def graph_difference(device: torch.device) -> float:
    """Trains a small model by a captured step and by the step itself, on another batch."""
    torch.manual_seed(0)
    model = TransformerXL(MODEL).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch, other = torch.randint(MODEL.vocab_size, (2, B, T + 1), device=device)
    with torch.no_grad():
        memory = model(batch[:, :-1]).memory
    before, state = parameters_to_vector(model.parameters()), copy.deepcopy(model.state_dict())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch[:, :-1], memory, batch[:, 1:]).loss.backward()
        optimizer.step()

    runs = captured(step, device), step
    batch.copy_(other)
    changes = []
    for train in runs:
        model.load_state_dict(state)
        train()
        changes.append(parameters_to_vector(model.parameters()).detach() - before.detach())
    assert bool(changes[1].any()), "the step changes no parameter"
    return float((changes[0] - changes[1]).norm() / changes[1].norm())


def captured(step: Step, device: torch.device) -> Step:
    """The replay of `step` as a CUDA graph; on a CPU the step itself."""
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles the kernels and tests them
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
