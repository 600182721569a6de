"""The evaluated layer: all contenders have one result; its operations are counted."""

from __future__ import annotations

import pytest
import torch

from benchmarks import registry
from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError
from benchmarks.cases.layer import (
    HF,
    HF_BF16,
    HIDDEN_STATES,
    LayerCase,
    LayerRun,
    expected,
)
from benchmarks.peers import hf
from transformer_xl.config import load_preset

SHAPE = registry.evaluated_layer("enwik8_large", mem_len=3800, clamp_len=1000)
TINY = SHAPE.tiny()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_contenders_have_the_references_result(dtype):
    case = LayerCase(TINY, dtype)
    for name in (OURS, HIDDEN_STATES):
        case.check(name)
        with case.contender(name) as run:
            assert run() > 0


@pytest.mark.slow
def test_hugging_faces_layer_has_the_references_result():
    try:
        hf.interpreter()
    except PeerUnavailableError as error:
        pytest.skip(str(error))
    for dtype, names in ((torch.float32, (HF,)), (torch.bfloat16, (HF, HF_BF16))):
        case = LayerCase(TINY, dtype)
        assert case.peers == names
        for name in names:
            case.check(name)
    with case.contender(HF) as run:
        assert run() > 0


def test_window_and_memory_agree_at_full_memory_and_the_window_moves_on():
    cached = LayerRun(TINY, torch.float64, cached=True)
    first = cached.evaluate()
    torch.testing.assert_close(first, expected(TINY))
    assert not torch.allclose(cached.evaluate(), first), "the segment is now a part of the memory"
    hidden = LayerRun(TINY, torch.float64, cached=False)
    torch.testing.assert_close(hidden.evaluate(), hidden.evaluate(), rtol=0, atol=0)


def test_a_wrong_result_is_found(monkeypatch):
    evaluate = LayerRun._evaluate_window
    monkeypatch.setattr(LayerRun, "_evaluate_window", lambda run: evaluate(run) * (1 + 1e-4))
    with pytest.raises(WrongResultError, match="ours is off by"):
        LayerCase(TINY, torch.float32).check(OURS)


def test_the_shape_is_the_published_evaluations():
    config, protocol = SHAPE.config, load_preset("enwik8_large").evaluate
    assert (config.d_model, config.n_head, config.d_head, config.d_inner) == (1024, 8, 128, 3072)
    assert (config.mem_len, config.clamp_len) == (protocol.mem_len, protocol.clamp_len)
    assert (SHAPE.tgt_len, config.same_length) == (protocol.tgt_len, protocol.same_length)


def test_operations_of_the_contenders():
    d, T, M, d_inner = 1024, 128, 3800, 3072
    feed_forward = 2 * T * 2 * d * d_inner
    kernel = 3 * 2 * T * M * d
    assert SHAPE.flop(OURS) == 4 * 2 * T * d * d + feed_forward + kernel
    more = 2 * 2 * M * d * d + 2 * 1001 * d * d  # the memory's keys and values, and r
    assert SHAPE.flop(HIDDEN_STATES) == SHAPE.flop(OURS) + more
    assert SHAPE.flop(HIDDEN_STATES) / SHAPE.flop(OURS) == pytest.approx(4.2, abs=0.05)
    assert SHAPE.flop(HF) / SHAPE.flop(OURS) == pytest.approx(6.7, abs=0.05)
