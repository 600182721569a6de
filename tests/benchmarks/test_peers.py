"""Peers compute what the reference computes, and the gate notices one that does not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.cases import OURS, WrongResultError
from benchmarks.cases.rel_attention import (
    COMPILED,
    EAGER,
    SDPA_BIAS,
    SDPA_PLAIN,
    AttentionCase,
)
from benchmarks.inputs import AttentionShape
from benchmarks.peers import eager
from txl_kernels import rel_shift

CAUSAL = AttentionShape(name="causal", B=2, H=3, Tq=9, Tm=6, D=5, causal=True)
SHAPES = [
    CAUSAL,
    AttentionShape(name="no_memory", B=1, H=2, Tq=8, Tm=0, D=8, causal=True),
    AttentionShape(name="padded", B=2, H=2, Tq=7, Tm=0, D=4, causal=False, key_lens=(7, 3)),
    AttentionShape(name="cached", B=1, H=1, Tq=4, Tm=9, D=4, causal=False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", [OURS, EAGER, SDPA_BIAS])
def test_results_pass_the_gate(name, shape, direction, dtype):
    AttentionCase(shape, dtype, direction).check(name)


@pytest.mark.slow
def test_compiled_results_pass_the_gate():
    AttentionCase(CAUSAL, torch.float32, "forward").check(COMPILED)


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_every_contender_runs_and_tells_its_seconds(direction):
    case = AttentionCase(CAUSAL, torch.float32, direction)
    for name in {OURS, *case.in_process} - {COMPILED}:
        with case.contender(name) as run:
            assert run() > 0
            assert run() > 0


def test_the_gate_stops_a_wrong_result(monkeypatch):
    case = AttentionCase(CAUSAL, torch.float32, "forward")
    monkeypatch.setattr(eager, "rel_shift", lambda x, Tk: x[..., :Tk])
    with pytest.raises(WrongResultError, match="out of eager is off by"):
        case.check(EAGER)


def test_the_gate_stops_nan(monkeypatch):
    case = AttentionCase(CAUSAL, torch.float32, "forward")
    monkeypatch.setattr(eager, "rel_shift", lambda x, Tk: x[..., :Tk] * torch.nan)
    with pytest.raises(WrongResultError, match="nan"):
        case.check(EAGER)


def test_shift_by_viewing_is_the_shift():
    x = torch.randn(2, 3, 5, 9)
    allowed = ~torch.ones(5, 9, dtype=torch.bool).triu(1 + 4)  # row 0 sees keys 0 … 4
    shifted = rel_shift(x)
    assert torch.equal(eager.rel_shift(x, 9)[..., allowed], shifted[..., allowed])


def test_the_yardstick_sees_as_many_keys():
    case = AttentionCase(dataclasses.replace(CAUSAL, Tm=20), torch.float32, "forward")
    attend, (_, keys, values) = case._bound(SDPA_PLAIN)
    assert keys.shape == values.shape == (2, 3, 29, 5)
    assert attend().shape == (2, 3, 9, 5)
