"""The headline cases: their shapes, their peers at tiny sizes, and time by events of a fake GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import device, headline
from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError
from benchmarks.cases import rel_attention as attention
from benchmarks.cases.rel_attention import CUDNN, EAGER, FLASH, SDPA_BIAS, AttentionCase
from benchmarks.peers import flex, sdpa

BY_NAME = {shape.name: shape for shape in headline.ATTENTION}
TINY = [dataclasses.replace(shape.tiny(), D=8) for shape in headline.ATTENTION]


def case(shape, direction="forward"):
    return AttentionCase(shape, torch.bfloat16, direction)


def test_the_shapes_are_those_of_the_models():
    sizes = {name: (s.B, s.H, s.Tq, s.Tm, s.D, s.n_rows) for name, s in BY_NAME.items()}
    assert sizes["train_d64"] == (8, 16, 2048, 2048, 64, 4096)
    assert sizes["decode"] == (32, 16, 1, 3799, 64, 3800)
    assert sizes["parakeet_10min"] == (1, 8, 7500, 0, 64, 14999)
    assert sizes["inkling_global_32k"] == (1, 32, 32768, 0, 128, 1024)
    assert sizes["inkling_sliding_8k"] == (1, 32, 8192, 0, 128, 512)
    assert BY_NAME["inkling_sliding_8k"].window == 511


def test_operations_count_the_pairs_of_each_contender():
    sliding = dataclasses.replace(BY_NAME["inkling_sliding_2k"], Tq=8, window=2, rel_extent=2)
    assert sliding.attended_pairs == 32 * (1 + 2 + 6 * 3)
    assert sliding.position_pairs == 32 * (1 + 7 * 2)
    cuda = AttentionCase(sliding, torch.bfloat16, "backward", "cuda")
    assert cuda.flop == 128 * 32 * (10 * 21 + 6 * 15)
    assert cuda.flop_of(FLASH) == cuda.flop_of(CUDNN) == 128 * 32 * 10 * 36
    memory = dataclasses.replace(BY_NAME["train_d64"], Tq=2, Tm=2)
    cuda = AttentionCase(memory, torch.bfloat16, "forward", "cuda")
    assert cuda.flop_of(FLASH) == 64 * 128 * 4 * (3 + 4)
    assert cuda.flop_of(CUDNN) == 64 * 128 * 4 * (1 + 2 + 3 + 4)


@pytest.mark.parametrize("name", [OURS, EAGER, SDPA_BIAS, "flex"])
@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_peers_agree_in_the_last_queries(shape, name, monkeypatch):
    """FlexAttention without its compiler."""
    monkeypatch.setattr(attention, "CHECKED_QUERIES", 5)
    monkeypatch.setattr(flex, "compiled", lambda: lambda *args: flex.attend(flex_attention, *args))
    tiny = case(shape)
    tiny._compare(name, ["out"], *tiny._last_queries(name))
    monkeypatch.setattr(attention, "GATE", {torch.bfloat16: 1e-9})
    with pytest.raises(WrongResultError, match="out of"):
        tiny._compare(name, ["out"], *tiny._last_queries(name))


def test_yardsticks_get_as_many_queries_as_their_mask_needs(monkeypatch):
    seen = {}
    monkeypatch.setattr(sdpa, "cudnn", lambda q, k, v, causal: seen.update({CUDNN: q.shape[2]}))
    monkeypatch.setattr(sdpa, "flash", lambda q, k, v, causal: seen.update({FLASH: q.shape[2]}))
    for name in (CUDNN, FLASH):
        case(TINY[0])._bound(name)[0]()
    assert seen == {CUDNN: TINY[0].n_keys, FLASH: TINY[0].Tq}
    monkeypatch.undo()
    with pytest.raises(PeerUnavailableError, match="flash"):
        case(TINY[0])._bound(FLASH)[0]()


class Event:
    """Each event is recorded one millisecond after the one before."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return float(end.at - self.at)


def test_time_on_a_gpu_is_between_events_and_inputs_take_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    flushed, ran = [], []
    monkeypatch.setattr(device, "Flush", lambda _: lambda: flushed.append(len(ran)))
    timed = device.timer([lambda: ran.append("a"), lambda: ran.append("b")], torch.device("cuda"))
    assert [timed() for _ in range(3)] == [1e-3] * 3
    assert ran == ["a", "b", "a"]
    assert flushed == [0, 1, 2]
