"""The headline cases: their operations, their peers at tiny sizes, and time on a fake GPU."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import device, headline
from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError
from benchmarks.cases import rel_attention as attention
from benchmarks.cases.rel_attention import CUDNN, EAGER, FLASH, SDPA_BIAS, AttentionCase
from benchmarks.peers import flex

TINY = [dataclasses.replace(shape.tiny(), D=8) for shape in headline.ATTENTION]


def test_operations_count_the_pairs_of_each_contender():
    (sliding,) = (x for x in headline.INKLING if x.name == "inkling_sliding_2k")
    sliding = dataclasses.replace(sliding, Tq=8, window=2, rel_extent=2)
    assert sliding.attended_pairs == 32 * (1 + 2 + 6 * 3)
    assert sliding.position_pairs == 32 * (1 + 7 * 2)
    case = AttentionCase(sliding, torch.bfloat16, "backward", "cuda")
    assert case.flop == 32 * (128 * 10 * 21 + 16 * 6 * 15)
    assert case.flop_of(FLASH) == case.flop_of(CUDNN) == 128 * 32 * 10 * 36
    after_memory = dataclasses.replace(headline.TRAIN[0], Tq=2, Tm=2)
    case = AttentionCase(after_memory, torch.bfloat16, "forward", "cuda")
    assert case.flop_of(FLASH) == 64 * 128 * 4 * (3 + 4)
    assert case.flop_of(CUDNN) == 64 * 128 * 4 * (1 + 2 + 3 + 4)


@pytest.mark.parametrize("name", [OURS, EAGER, SDPA_BIAS, "flex"])
@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_peers_agree_in_the_last_queries(shape, name, monkeypatch):
    """FlexAttention without its compiler."""
    monkeypatch.setattr(attention, "CHECKED_QUERIES", 5)
    monkeypatch.setattr(flex, "compiled", lambda: lambda *args: flex.attend(flex_attention, *args))
    case = AttentionCase(shape, torch.bfloat16, "forward")
    case._compare(name, ["out"], *case._last_queries(name))
    monkeypatch.setattr(attention, "GATE", {torch.bfloat16: 1e-9})
    with pytest.raises(WrongResultError, match="out of"):
        case._compare(name, ["out"], *case._last_queries(name))


def test_yardsticks_get_as_many_queries_as_their_mask_needs():
    for name in (CUDNN, FLASH):
        case = AttentionCase(TINY[0], torch.bfloat16, "forward")
        attend, (q, keys, _) = case._bound(name)
        assert q.shape[2] == (TINY[0].n_keys if name == CUDNN else TINY[0].Tq)
        assert keys.shape[2] == TINY[0].n_keys
    with pytest.raises(PeerUnavailableError, match="flash"):
        attend()


def test_time_on_a_gpu_is_between_events_and_inputs_take_turns(monkeypatch):
    calls = mock.Mock()
    calls.elapsed_time.return_value = 2.0
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: calls)
    monkeypatch.setattr(device, "_flush_buffer", lambda _: calls)
    monkeypatch.setattr(device, "_FILLS", 1)
    timed = device.timer([calls.a, calls.b], torch.device("cuda"))
    assert [timed(), timed()] == [2e-3] * 2
    turn = ["record", "a", "record", "synchronize", "elapsed_time"]
    assert [call[0] for call in calls.method_calls[:6]] == ["fill_", *turn]
    assert calls.b.called
