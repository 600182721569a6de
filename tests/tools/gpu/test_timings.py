"""The stage "timings" on a CPU at tiny shapes: its order, its rows, its budget."""

from __future__ import annotations

import pytest
import torch

from benchmarks import headline
from benchmarks.cases import OURS
from benchmarks.cases.rel_attention import CUDNN, EAGER, FLASH, FLEX, SDPA_BIAS, AttentionCase
from tools.gpu import timings
from tools.gpu.stages import Context

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CEILINGS = {"copy_bytes_per_second": 1e9, "gemm_flop_per_second": 1e9}


@pytest.fixture
def context():
    return Context({}, lambda: None, lambda: 100.0, CPU, CEILINGS)


def cases(*names):
    """Tiny cases on the CPU with the contenders that run there without a compiler."""
    tiny = [case.tiny() for case in headline.device_cases("cpu")]
    return [(case, (OURS, *names)) for case in tiny[:2] + tiny[4:5]]


def test_ours_is_timed_first_and_compiled_peers_last():
    plan = [(case.name, names) for case, names in timings.plan(CUDA)]
    n = len(headline.device_cases())
    assert all(names == (OURS,) for _, names in plan[:n])
    assert plan[n] == (
        "rel_attention/train_d64/bfloat16/forward", (OURS, EAGER, SDPA_BIAS, FLASH, CUDNN)
    )  # fmt: skip
    assert plan[-1][1] == (OURS, FLEX)
    shapes = [name.split("/")[1] for name, _ in plan[:n]]
    assert shapes[:7:2] == ["train_d64", "train_d128", "decode", "wt103_large"]
    assert {f"inkling_{kind}_{k}k" for kind in ("global", "sliding") for k in (2, 8, 32)} < set(
        shapes
    )
    assert "parakeet_10min" in shapes


def test_rows_have_rates_shares_and_ratios(context, monkeypatch):
    monkeypatch.setattr(timings, "plan", lambda device: cases() + cases(EAGER))
    timings.run(context)
    assert len(context.results["cases"]) == 3
    for name, rows in context.results["cases"].items():
        assert set(rows) == {OURS, EAGER}
        for row in rows.values():
            assert row["ms"]["q1"] <= row["ms"]["median"] <= row["ms"]["q3"]
            assert row["of_ceiling"] > 0
        assert rows[EAGER]["over_ours"] > 0
        assert ("terabytes_per_second" in rows[OURS]) == ("decode" in name)
    assert "eager" in context.results["summary"][1]


def test_a_failing_peer_has_a_note_and_a_failing_call_of_ours_fails_the_stage(context, monkeypatch):
    right = AttentionCase.check

    def check(case, name):
        if name == SDPA_BIAS or (name == OURS and case.shape.D == 64 and case.shape.Tq > 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
        right(case, name)

    monkeypatch.setattr(AttentionCase, "check", check)
    monkeypatch.setattr(timings, "plan", lambda device: cases(SDPA_BIAS))
    with pytest.raises(AssertionError, match="train_d64/bfloat16/forward: OutOfMemoryError"):
        timings.run(context)
    rows = context.results["cases"]["rel_attention/decode/bfloat16/forward"]
    assert rows[SDPA_BIAS] == {"note": "OutOfMemoryError: CUDA out of memory. Tried"}
    assert rows[OURS]["ms"]


def test_the_stage_stops_within_its_budget(context, monkeypatch):
    seconds = iter([10.0, 1.0])
    context.seconds_left = lambda: next(seconds)
    monkeypatch.setattr(timings, "plan", lambda device: cases())
    timings.run(context)
    assert len(context.results["cases"]) == 1
    assert context.results["stopped"].startswith("no time was left for rel_attention/train_d64")


def test_a_whole_rehearsal(context):
    """The order of a GPU with all peers that the CPU has."""
    timings.run(context)
    assert len(context.results["cases"]) == len(headline.device_cases())
