"""Stage "graphs": calls captured in a CUDA graph give, replayed on new inputs, the call's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import device
from benchmarks.gpu.attention import DECODE, OURS, TRAIN, bind, inputs_on
from benchmarks.inputs import AttentionShape


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Results: per call True, or False where a replay gave other bits.

    Raises:
        Unavailable: no CUDA device.
        AssertionError: a replay differed.
    """
    gpu = device.require()
    for shape in (*TRAIN, DECODE):
        results[f"{shape.name}/forward"] = _replays_forward(shape, gpu)
        save()
    wrong = [name for name, same in results.items() if not same]
    assert not wrong, f"a captured graph replays to other bits: {', '.join(wrong)}"


@torch.no_grad()
def _replays_forward(shape: AttentionShape, gpu: torch.device) -> bool:
    """Captured on one set of inputs, replayed on another copied into its place."""
    inputs = inputs_on(shape, gpu, requires_grad=False)
    attend, _ = bind(OURS, shape, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for tensor, other in zip(
        inputs.leaves(), inputs_on(shape, gpu, requires_grad=False, seed=1).leaves(), strict=True
    ):
        tensor.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    return torch.equal(out, attend())
