"""A whole run on tiny cases: figures, notes, table, JSON, plot; memory and the step's parts."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from benchmarks import machine, peak_memory, plot, registry, report, step_profile
from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError
from benchmarks.cases.few_row_linear import LinearCase
from benchmarks.cases.model import ModelCase
from benchmarks.cases.rel_attention import COMPILED, EAGER, SDPA_BIAS, SDPA_PLAIN, AttentionCase
from benchmarks.inputs import AttentionShape
from benchmarks.measure import Probe
from benchmarks.step_profile import Share
from benchmarks.suite import Effort, Figures, take

SHAPE = AttentionShape(name="tiny", B=1, H=2, Tq=24, Tm=8, D=8, causal=True)
QUICK = Effort(pairs=2, sample_seconds=0.0, memory=False)
MACHINE = {
    "processor": "a processor",
    "threads": 2,
    "torch": "2",
    "native": "built and loaded",
    "matmul_float32": 100.0,
    "matmul_bfloat16": 200.0,
    "tiles": {"sgemm": 150.0},
}


@pytest.fixture
def uncompiled(monkeypatch):
    """Peers without the compiled one, and limits without probing for long."""
    contender = AttentionCase.contender

    def without_compiler(case, name):
        if name == COMPILED:
            raise PeerUnavailableError("no compiler")
        return contender(case, name)

    monkeypatch.setattr(AttentionCase, "contender", without_compiler)
    monkeypatch.setattr(AttentionCase, "check", lambda case, name: None)
    monkeypatch.setattr(machine, "limit", lambda dtype, device: machine.Limit("brgemm_f32", 300.0))


def test_a_case_is_taken_and_reported(uncompiled, tmp_path):
    case = AttentionCase(SHAPE, torch.float32, "forward")
    figures = take(case, Probe(size=64), QUICK)
    assert set(figures.peers) == {EAGER, SDPA_BIAS}
    assert set(figures.yardsticks) == {SDPA_PLAIN}
    assert figures.notes == {COMPILED: "PeerUnavailableError: no compiler"}
    assert figures.fastest_peer in figures.peers
    assert figures.gflops == pytest.approx(case.flop / figures.seconds.median / 1e9)
    assert figures.share_of_limit == pytest.approx(figures.gflops / 300)

    profile = [Share("products", 2.0, 0.8), Share("host", 0.5, 0.2)]
    console = Console(record=True, width=160, file=(tmp_path / "console").open("w"))
    report.print_report(console, MACHINE, [figures], profile)
    shown = console.export_text()
    for expected in ("a processor", "tiny", "brgemm", "no compiler", "80.0%"):
        assert expected in shown
    cases = report.write_json(tmp_path / "new" / "run.json", MACHINE, [figures], profile)
    record = json.loads((tmp_path / "new" / "run.json").read_text())
    assert record["machine"]["processor"] == "a processor"
    assert record["cases"][0]["peers"][EAGER]["pairs"] == 2
    assert record["training_step"][0]["share"] == 0.8
    plot.plot(tmp_path / "run.png", cases, "a processor")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_a_case_that_reads_much_is_compared_with_the_bandwidth(uncompiled, monkeypatch):
    monkeypatch.setattr(machine, "read_limit", lambda: machine.Limit("read", 30.0))
    decoded = AttentionCase(dataclasses.replace(SHAPE, Tq=1), torch.float32, "forward")
    linear = LinearCase(2, 8, 16, torch.float32, weight_bytes=2**10)
    assert (decoded.bytes_read, linear.bytes_read) == (4 * 3 * 2 * 9 * 8, 2**10)
    for case in (decoded, linear):
        figures = take(case, Probe(size=64), QUICK)
        assert figures.gflops is None
        rate = case.bytes_read / figures.seconds.median / 1e9
        assert figures.gigabytes_per_second == pytest.approx(rate)
        assert figures.share_of_limit == pytest.approx(rate / 30)


def test_a_run_of_some_cases_renews_those_and_keeps_the_others(tmp_path):
    path, profile = tmp_path / "run.json", [Share("products", 2.0, 0.8)]
    first = [Figures("op/a/float32/forward", gflops=1.0), Figures("op/b/float32/forward")]
    report.write_json(path, MACHINE, first, profile)
    report.write_json(path, MACHINE, [Figures("op/a/float32/forward", gflops=2.0)])
    record = json.loads(path.read_text())
    assert [(case["case"][:4], case["gflops"]) for case in record["cases"]] == [
        ("op/a", 2.0),
        ("op/b", None),
    ]
    assert record["training_step"], "parts that were not taken again stay"


def test_backward_alone_is_timed_without_peers(uncompiled):
    figures = take(AttentionCase(SHAPE, torch.float32, "backward"), Probe(size=64), QUICK)
    assert figures.seconds is not None
    assert not figures.peers
    assert figures.fastest_peer is None


def test_no_speed_is_reported_for_a_wrong_result(monkeypatch):
    def wrong(case, name):
        raise WrongResultError(f"{name} is off")

    monkeypatch.setattr(AttentionCase, "check", wrong)
    figures = take(AttentionCase(SHAPE, torch.float32, "forward"), Probe(size=64), QUICK)
    assert figures.seconds is None
    assert not figures.peers
    assert figures.notes == {OURS: "WrongResultError: ours is off"}


@pytest.mark.slow
def test_peak_memory_is_that_of_the_materialised_scores():
    name = "rel_attention/enwik8_base_train/float32/forward"
    shape = registry.case(name).shape
    scores = shape.B * shape.H * shape.Tq * shape.n_keys * 4 / 2**20
    grown = peak_memory.in_child(name, EAGER).mib
    assert 2 * scores < grown < 12 * scores


def test_a_child_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="unknown case"):
        peak_memory.in_child("rel_attention/none", OURS)


def test_parts_of_a_training_step_add_up():
    shape = registry.model_shapes()[0].tiny()
    shape = dataclasses.replace(shape, config=dataclasses.replace(shape.config, n_layer=1))
    parts = step_profile.profile_step(shape, torch.float32, steps=1)
    assert sum(part.share for part in parts) == pytest.approx(1)
    names = [part.part for part in parts]
    assert len(set(names)) == len(names)
    found = {"dropout", "LayerNorm", "optimizer and clipping", step_profile.HOST}
    assert found <= set(names)


def test_our_model_passes_its_gate():
    shape = registry.model_shapes()[0].tiny()
    for dtype in (torch.float32, torch.bfloat16):
        case = ModelCase(shape, dtype, "evaluate")
        case.check(OURS)
        with case.contender(OURS) as run:
            assert run() > 0


def test_the_processor_has_a_name_for_files():
    here = machine.processor()
    assert here.name
    assert here.slug.replace("-", "").isalnum()
