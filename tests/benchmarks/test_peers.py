"""Peers compute the same as the reference, and the gate finds one that does not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError
from benchmarks.cases.rel_attention import (
    COMPILED,
    EAGER,
    HF_RESTATED,
    HF_SDPA,
    SDPA_BIAS,
    SDPA_CAUSAL,
    SDPA_PLAIN,
    AttentionCase,
)
from benchmarks.inputs import AttentionShape
from benchmarks.peers import eager, inkling
from txl_kernels import rel_shift

CAUSAL = AttentionShape(name="causal", B=2, H=3, Tq=9, Tm=6, D=5, causal=True)
SHAPES = [
    CAUSAL,
    AttentionShape(name="no_memory", B=1, H=2, Tq=8, Tm=0, D=8, causal=True),
    AttentionShape(name="padded", B=2, H=2, Tq=7, Tm=0, D=4, causal=False, key_lens=(7, 3)),
    AttentionShape(name="cached", B=1, H=1, Tq=4, Tm=9, D=4, causal=False),
]

INKLING = AttentionShape(
    name="inkling", B=2, H=6, Hk=2, Tq=14, Tm=0, D=8, causal=True, d_rel=5, rel_extent=6, window=9
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", [OURS, EAGER, SDPA_BIAS])
def test_results_pass_the_gate(name, shape, direction, dtype):
    AttentionCase(shape, dtype, direction).check(name)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("window", [9, None], ids=["sliding", "global"])
@pytest.mark.parametrize("name", [OURS, HF_RESTATED, HF_SDPA])
def test_layers_of_inkling_pass_the_gate(name, window, direction):
    shape = dataclasses.replace(INKLING, window=window)
    try:
        AttentionCase(shape, torch.float32, direction).check(name)
    except PeerUnavailableError as error:
        pytest.skip(str(error))


def test_the_gate_finds_a_bias_at_a_wrong_distance(monkeypatch):
    right = inkling.position_bias
    monkeypatch.setattr(inkling, "position_bias", lambda rel, proj, d: right(rel, proj, d + 1))
    with pytest.raises(WrongResultError, match="out of hf-restated is off by"):
        AttentionCase(INKLING, torch.float32, "forward").check(HF_RESTATED)


def test_the_causal_yardstick_has_grouped_heads_and_all_pairs():
    case = AttentionCase(INKLING, torch.float32, "forward")
    attend, (q, keys, values) = case._bound(SDPA_CAUSAL)
    assert attend().shape == q.shape == (2, 6, 14, 8)
    assert keys.shape == values.shape == (2, 2, 14, 8)
    assert case.flop_of(SDPA_CAUSAL) == 8 * 4 * 2 * 6 * (14 * 15 // 2)


@pytest.mark.slow
def test_compiled_results_pass_the_gate():
    AttentionCase(CAUSAL, torch.float32, "forward").check(COMPILED)


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_every_contender_runs_and_returns_its_seconds(direction):
    for shape in (CAUSAL, INKLING):
        case = AttentionCase(shape, torch.float32, direction)
        for name in {OURS, *case.in_process} - {COMPILED}:
            with case.contender(name) as run:
                assert run() > 0
                assert run() > 0


def test_the_gate_finds_a_wrong_result(monkeypatch):
    case = AttentionCase(CAUSAL, torch.float32, "forward")
    monkeypatch.setattr(eager, "rel_shift", lambda x, Tk: x[..., :Tk])
    with pytest.raises(WrongResultError, match="out of eager is off by"):
        case.check(EAGER)


def test_the_gate_finds_nan(monkeypatch):
    case = AttentionCase(CAUSAL, torch.float32, "forward")
    monkeypatch.setattr(eager, "rel_shift", lambda x, Tk: x[..., :Tk] * torch.nan)
    with pytest.raises(WrongResultError, match="nan"):
        case.check(EAGER)


def test_shift_by_viewing_is_the_shift():
    x = torch.randn(2, 3, 5, 9)
    allowed = ~torch.ones(5, 9, dtype=torch.bool).triu(1 + 4)  # row 0 attends to keys 0 … 4
    shifted = rel_shift(x)
    assert torch.equal(eager.rel_shift(x, 9)[..., allowed], shifted[..., allowed])


def test_the_yardstick_attends_to_as_many_keys():
    case = AttentionCase(dataclasses.replace(CAUSAL, Tm=20), torch.float32, "forward")
    attend, (_, keys, values) = case._bound(SDPA_PLAIN)
    assert keys.shape == values.shape == (2, 3, 29, 5)
    assert attend().shape == (2, 3, 9, 5)
