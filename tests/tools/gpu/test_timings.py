"""The stages "timings" and "memory" on a CPU at tiny shapes: order, rows, failures, budget."""

from __future__ import annotations

import pytest
import torch

from benchmarks import headline
from benchmarks.cases import OURS
from benchmarks.cases.rel_attention import CUDNN, EAGER, FLASH, FLEX, SDPA_BIAS, AttentionCase
from tools.gpu import memory, timings
from tools.gpu.stages import Context

CEILINGS = {timings.COPY: 1e9, timings.PRODUCT: 1e9}


@pytest.fixture
def context(monkeypatch):
    """Three cases with ours, and two peers of which one has not enough memory."""

    def plan(_):
        tiny = [case.tiny() for case in headline.device_cases("cpu")]
        return [(case, (OURS, EAGER, SDPA_BIAS)) for case in (*tiny[:2], tiny[4])]

    right = AttentionCase.contender

    def contender(case, name):
        if name == SDPA_BIAS:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return right(case, name)

    monkeypatch.setattr(timings, "plan", plan)
    monkeypatch.setattr(AttentionCase, "contender", contender)
    return Context({}, lambda: None, lambda: 100.0, torch.device("cpu"), CEILINGS)


def test_ours_is_timed_first_and_compiled_peers_last():
    plan = [(case.name, names) for case, names in timings.plan(torch.device("cuda"))]
    n = len(headline.device_cases())
    assert all(names == (OURS,) for _, names in plan[:n])
    assert plan[n][1] == (OURS, EAGER, SDPA_BIAS, FLASH, CUDNN)
    assert plan[-1][1] == (OURS, FLEX)
    shapes = [name.split("/")[1] for name, _ in plan[:n]]
    assert shapes[:7:2] == ["train_d64", "train_d128", "decode", "wt103_large"]
    kinds = {f"inkling_{kind}_{k}k" for kind in ("global", "sliding") for k in (2, 8, 32)}
    assert kinds | {"parakeet_10min"} < set(shapes)


def test_rows_have_rates_shares_ratios_and_notes(context):
    timings.run(context)
    assert len(context.results["cases"]) == 3
    for rows in context.results["cases"].values():
        for name in {OURS, EAGER} & set(rows):
            row = rows[name]
            assert row["ms"]["q1"] <= row["ms"]["median"] <= row["ms"]["q3"]
            assert row["of_ceiling"] > 0
    forward = context.results["cases"]["rel_attention/train_d64/bfloat16/forward"]
    assert forward[EAGER]["over_ours"] > 0
    assert forward[SDPA_BIAS] == {"note": "OutOfMemoryError: CUDA out of memory."}
    assert "eager" in context.results["summary"][1]


def test_a_wrong_call_of_ours_fails_and_time_runs_out(context, monkeypatch):
    monkeypatch.setattr(AttentionCase, "check", lambda case, name: 1 / (case.shape.D - 64))
    seconds = iter([10.0, 1.0])
    context.seconds_left = lambda: next(seconds)
    with pytest.raises(AssertionError, match="train_d64/bfloat16/forward: ZeroDivisionError"):
        timings.run(context)
    assert len(context.results["cases"]) == 1
    assert "backward" in context.results["stopped"]


def test_memory_of_every_call_and_a_replay_that_ignores_its_batch(context, monkeypatch):
    memory.run(context)
    peaks = context.results["peak_mib"]
    assert set(peaks) == {*(shape.name for shape in memory.SHAPES), "wt103_large"}
    assert peaks["train_d64"] | {"ours": 0.0, EAGER: 0.0} == peaks["train_d64"]
    assert peaks["train_d64"][SDPA_BIAS] == "OutOfMemoryError: CUDA out of memory."
    assert context.results["graph_difference"] == 0.0
    monkeypatch.setattr(memory, "captured", lambda step, device: lambda: None)
    with pytest.raises(AssertionError, match=r"a replayed training step differs by 1\.0e\+00"):
        memory.run(context)
