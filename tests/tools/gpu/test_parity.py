"""The stage "parity" on a CPU at tiny shapes: its calls, its failures, its budget, its records."""

from __future__ import annotations

import pytest
import torch

from benchmarks import headline
from tools.gpu import parity
from tools.gpu.stages import Context
from txl_kernels import resolve
from txl_kernels.backends import verification


@pytest.fixture
def context():
    reason = resolve("rel_attention", backend="native", device="cpu", needs_grad=True).reason
    if reason is not None:
        pytest.skip(reason)
    return Context({}, lambda: None, lambda: 100.0, torch.device("cpu"), {})


def test_ten_calls_pass_in_both_dtypes_and_their_kernels_are_recorded(context, monkeypatch):
    monkeypatch.setattr(verification, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(verification, "_test", lambda *_: pytest.fail("a self-test ran"))
    parity.run(context)
    names = {name.rpartition("/")[0] for name in context.results["calls"]}
    shapes = [*parity.ATTENTION, headline.SOFTMAX]
    assert names == {f"{s.name}/{dtype}" for s in shapes for dtype in ("bfloat16", "float16")}
    assert context.results["summary"] == ["20 of 20 calls passed"]
    labels = set(context.results["verified"].values())
    assert "rel_attention/native/float16/backward" in labels
    assert "adaptive_loss/native/bfloat16/forward" in labels


def test_a_failure_is_recorded_and_the_others_run(context, monkeypatch):
    def faulty(case, *_, **__):
        assert case.D != 64, "dq: error 1 over the budget of 0.1"

    monkeypatch.setattr(parity, "check_rel_attention", faulty)
    with pytest.raises(AssertionError, match=r"train_d64/bfloat16/native: .* over the budget"):
        parity.run(context)
    assert context.results["calls"]["train_d128/bfloat16/native"].startswith("passed")


def test_without_time_nothing_is_compared(context):
    context.seconds_left = lambda: 0.0
    with pytest.raises(AssertionError, match="nothing was compared"):
        parity.run(context)
    assert set(context.results["calls"].values()) == {"not run: no time was left"}


def test_lengths_are_the_timed_ones_and_references_stay_small():
    calls = {call.name: call.check.args[0] for call in parity.calls(torch.device("cuda"))}
    assert f"{headline.DECODE.name}/bfloat16/native" in calls
    for shape in parity.ATTENTION:
        case = calls[f"{shape.name}/float16/triton"]
        assert (case.Tq, case.Tm, case.D, case.R) == (shape.Tq, shape.Tm, shape.D, shape.n_rows)
        n_queries = parity.LAST_QUERIES if case.Tq > parity.LONG else case.Tq
        assert 8 * case.H * n_queries * max(shape.n_keys, shape.n_rows) < 2 * 2**30
