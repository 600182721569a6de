"""The stage "parity" on a CPU at tiny shapes: its calls, its failures, its budget."""

from __future__ import annotations

import pytest
import torch

from benchmarks import headline
from tools.gpu import parity
from tools.gpu.stages import Context
from txl_kernels import resolve
from txl_kernels.backends import verification

CPU = torch.device("cpu")


@pytest.fixture
def context():
    reason = resolve("rel_attention", backend="native", device="cpu", needs_grad=True).reason
    if reason is not None:
        pytest.skip(reason)
    saved = []
    made = Context({}, lambda: saved.append(True), lambda: 100.0, CPU, {})
    yield made
    assert saved


def test_every_headline_call_is_compared_in_both_dtypes(context):
    parity.run(context)
    names = [name.rpartition("/")[0] for name in context.results["calls"]]
    assert len(names) == 2 * 10
    for shape in parity.ATTENTION:
        assert f"{shape.name}/bfloat16" in names
        assert f"{shape.name}/float16" in names
    assert context.results["summary"] == ["20 of 20 calls passed"]


def test_a_failure_is_recorded_and_the_others_run(context, monkeypatch):
    def faulty(case, *_, **__):
        assert case.D != 64, "dq: error 1 over the budget of 0.1"

    monkeypatch.setattr(parity, "check_rel_attention", faulty)
    with pytest.raises(AssertionError, match=r"train_d64/bfloat16/native: .* over the budget"):
        parity.run(context)
    assert context.results["calls"]["train_d128/bfloat16/native"].startswith("passed")
    assert any("parakeet" in line for line in context.results["summary"])


def test_the_kernels_that_passed_are_recorded(context, monkeypatch):
    monkeypatch.setattr(verification, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(verification, "_test", lambda *_: pytest.fail("a self-test ran"))
    before = dict(verification._verdicts)
    parity.run(context)
    labels = set(context.results["verified"].values())
    assert "rel_attention/native/bfloat16/forward" in labels
    assert "rel_attention/native/float16/backward" in labels
    assert "adaptive_loss/native/float16/forward" in labels
    assert verification._verdicts == before


def test_without_time_nothing_runs_and_the_stage_fails(context):
    context.seconds_left = lambda: 0.0
    with pytest.raises(AssertionError, match="no backend runs any"):
        parity.run(context)
    assert set(context.results["calls"].values()) == {"not run: no time was left"}


def test_the_lengths_are_the_timed_ones_and_references_stay_small():
    for shape in parity.ATTENTION:
        case = parity.attention_case(shape)
        assert (case.Tq, case.Tm, case.D, case.R) == (shape.Tq, shape.Tm, shape.D, shape.n_rows)
        n_queries = min(case.Tq, parity.LAST_QUERIES) if case.Tq > parity.LONG else case.Tq
        score_bytes = 8 * case.H * n_queries * max(shape.n_keys, shape.n_rows)
        assert score_bytes < 2 * 2**30, shape.name


def test_both_backends_decode_on_a_gpu():
    calls = {name: reason for name, _, reason, _ in parity.checks(torch.device("cuda"))}
    assert f"{headline.DECODE.name}/bfloat16/native" in calls
    if not torch.cuda.is_available():
        assert None not in calls.values()
        reason = resolve("rel_attention", backend="triton", device="cuda").reason
        assert calls["train_d64/bfloat16/triton"] == reason
