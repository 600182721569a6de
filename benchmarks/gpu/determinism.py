"""Stage "determinism": the same call twice gives the same bits, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import device
from benchmarks.gpu.attention import DECODE, OURS, TRAIN, bind, inputs_on
from benchmarks.inputs import AttentionInputs, AttentionShape


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Results: per call, which of its tensors differed; by default dR may, as its sums are atomic.

    Raises:
        Unavailable: no CUDA device.
        AssertionError: under deterministic algorithms a bit differed.
    """
    gpu = device.require()
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        kind = "deterministic" if deterministic else "default"
        for shape in (*TRAIN, DECODE):
            backward = shape.Tq > 1
            inputs = inputs_on(shape, gpu, requires_grad=backward)
            first, second = (_bits(shape, inputs, backward) for _ in range(2))
            differ = [name for name in first if not torch.equal(first[name], second[name])]
            results[f"{kind}/{shape.name}"] = differ
            save()
    torch.use_deterministic_algorithms(False)
    wrong = {
        call: differ
        for call, differ in results.items()
        if differ and (call.startswith("deterministic") or differ != ["dr"])
    }
    assert not wrong, f"not the same bits twice: {wrong}"


def _bits(shape: AttentionShape, inputs: AttentionInputs, backward: bool) -> dict[str, Tensor]:
    attend, leaves = bind(OURS, shape, inputs)
    if not backward:
        with torch.no_grad():
            return {"out": attend()}
    out = attend()
    dout = torch.randn(out.shape, device=out.device, generator=_generator(out)).to(out.dtype)
    names = [f"d{name}" for name, tensor in inputs._asdict().items() if tensor is not None]
    grads = torch.autograd.grad(out, leaves, dout)
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def _generator(tensor: Tensor) -> torch.Generator:
    return torch.Generator(tensor.device).manual_seed(1)
