"""Stage "determinism": the same call twice gives the same bits, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import device
from benchmarks.gpu.attention import DECODE, OURS, TRAIN, bind, inputs_on
from benchmarks.inputs import AttentionInputs, AttentionShape

DETERMINISTIC, DEFAULT = "deterministic", "default"


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Results: per call, which of its tensors differed, or what it raised; by default dR may
    differ, as its sums are atomic.

    Raises:
        UnavailableError: no CUDA device.
        AssertionError: under deterministic algorithms a bit differed, or a call failed.
    """
    gpu = device.require()
    for kind in (DETERMINISTIC, DEFAULT):
        for shape in (*TRAIN, DECODE):
            try:
                results[f"{kind}/{shape.name}"] = differences(shape, kind, gpu)
            except Exception as error:
                results[f"{kind}/{shape.name}"] = [f"{type(error).__name__}: {error}"]
            save()
    wrong = {
        call: differ
        for call, differ in results.items()
        if differ and (call.startswith(DETERMINISTIC) or differ != ["dr"])
    }
    assert not wrong, f"not the same bits twice: {wrong}"


def differences(shape: AttentionShape, kind: str, where: torch.device) -> list[str]:
    """Names of the tensors that a call and its backward pass, made twice, give in other bits."""
    backward = shape.Tq > 1
    inputs = inputs_on(shape, where, requires_grad=backward)
    torch.use_deterministic_algorithms(kind == DETERMINISTIC)
    try:
        first, second = (_bits(shape, inputs, backward) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    return [name for name in first if not torch.equal(first[name], second[name])]


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
