"""The headline cases: their shapes, their peers at tiny sizes, and time by events of a fake GPU."""

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
from txl_kernels import BackendUnavailableError
from txl_kernels.backends import Resolution

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


def test_yardsticks_get_as_many_queries_as_their_mask_needs():
    for name in (CUDNN, FLASH):
        attend, (q, keys, _) = case(TINY[0])._bound(name)
        assert q.shape[2] == (TINY[0].n_keys if name == CUDNN else TINY[0].Tq)
        assert keys.shape[2] == TINY[0].n_keys
    with pytest.raises(PeerUnavailableError, match="flash"):
        attend()


def test_time_on_a_gpu_is_between_events_and_inputs_take_turns(monkeypatch):
    events = mock.Mock()
    events.elapsed_time.return_value = 2.0
    ran = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: events)
    monkeypatch.setattr(device, "_flush", lambda _: lambda: ran.append("flush"))
    timed = device.timer([lambda: ran.append("a"), lambda: ran.append("b")], torch.device("cuda"))
    assert [timed(), timed(), timed()] == [2e-3] * 3
    assert ran == ["flush", "a", "flush", "b", "flush", "a"]
    assert [call[0] for call in events.method_calls[:4]] == [
        "record", "record", "synchronize", "elapsed_time"
    ]  # fmt: skip


def test_ours_on_a_gpu_never_falls_back(monkeypatch):
    monkeypatch.setattr(device, "resolve", lambda op, **call: Resolution("triton", None))
    assert device.preferred_backend("rel_attention", "cuda", Tq=5) == "triton"
    assert device.preferred_backend("rel_attention", "cpu") == "auto"
    monkeypatch.setattr(device, "resolve", lambda op, **call: Resolution("reference", "no device"))
    with pytest.raises(BackendUnavailableError, match="rel_attention: no device"):
        device.preferred_backend("rel_attention", "cuda")
