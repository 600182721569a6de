"""The runner of `make gpu`, with a clock and stages that only pretend, and one real process."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.gpu import __main__ as command
from tools.gpu import runner
from tools.gpu.runner import FIRST_CALL, MARGIN, Stage, UnavailableError
from txl_kernels.backends.verification import records

TYPICAL = {"compile": 40, "ceilings": 8, "compile_sweep": 30, "parity": 35}
TYPICAL |= {"timings": 68, "sweep": 45, "memory": 10}


@pytest.fixture
def run(monkeypatch):
    """Runs the first call; its stages take `seconds`, and `crashed` ends with the status -6."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(runner, "time", clock)
    monkeypatch.setattr(runner, "STARTED", 0.0)

    def run(budget=240.0, crashed=None, **seconds):
        def start(stage, *_):
            end, status = clock.now + (TYPICAL | seconds)[stage.name], -6 * (stage.name == crashed)
            record = {"status": "passed", "error": None, "results": {"found": 1}}
            exit_status = lambda: status if clock.now >= end else None  # noqa: E731
            return SimpleNamespace(exit_status=exit_status, record=lambda: record, kill=int)

        clock.now, found, written = 0.0, {}, []
        monkeypatch.setattr(runner, "StageProcess", start)
        ends = runner.deadlines(FIRST_CALL, 0.0, budget - MARGIN)
        runner.Run("cuda", ends, found, lambda: written.append(copy.deepcopy(found))).run(
            FIRST_CALL
        )
        assert clock.now <= budget
        assert written[-1] == found
        assert [sum("status" in x for x in each.values()) for each in written] == [*range(1, 8)]
        return found

    return run


def test_a_typical_run_follows_the_planned_timeline(run):
    begins = {"compile": 0, "ceilings": 0, "compile_sweep": 40, "parity": 40}
    begins |= {"timings": 75, "sweep": 143, "memory": 188}
    assert {name: x["start"] for name, x in run().items()} == pytest.approx(begins, abs=1)


def test_shares_of_the_budget():
    planned = {"compile": 60, "ceilings": 25, "compile_sweep": 100, "parity": 100}
    planned |= {"timings": 170, "sweep": 220, "memory": 240 - MARGIN}
    assert runner.deadlines(FIRST_CALL, 0.0, 240 - MARGIN) == pytest.approx(planned)
    assert runner.deadlines(FIRST_CALL, 5.0, 100.0)["timings"] == 100.0
    assert runner.deadlines([Stage("ncu", "", 100)], 5.0, 305.0) == {"ncu": 305.0}


def test_stages_that_cannot_start_in_time_are_reported(run):
    found = run(budget=100.0)
    assert found["timings"]["error"] == "it was ended at the end of its share"
    assert (found["memory"]["status"], found["memory"]["seconds"]) == ("not run", 0.0)


@pytest.mark.parametrize("name", TYPICAL)
def test_a_stage_that_hangs_or_crashes_keeps_its_results_and_the_other_stages(run, name):
    for found in (run(**{name: 1e9}), run(crashed=name)):
        assert [x for x, record in found.items() if record["status"] == "failed"] == [name]
        assert found[name]["results"] == {"found": 1}


def test_the_verdict_comes_first(run, capsys):
    report = {"stages": run(crashed="timings"), "machine": {"device": "GPU"}, "budget": 240.0}
    report["stages"]["parity"]["results"]["summary"] = ["ten launches"]
    capsys.readouterr()
    command.show(report)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[:2] == ["VERDICT: FAILED", "  failed: timings"]
    assert "  ten launches" in lines
    assert command.exit_status({"stages": {"ncu": {"status": "skipped"}}}) == 1


HANGS = """
import pathlib, subprocess, sys, time
def run(context):
    context.results["found"] = 1
    context.save()
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(__file__).with_name("worker").write_text(str(worker.pid))
    time.sleep(600)
"""


def test_a_stage_is_a_process_that_can_be_ended_with_its_workers(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setattr(runner, "BUILD", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    running = runner.StageProcess(Stage("hangs", "hangs:run", 60), time.monotonic() + 60, "cpu")
    worker = tmp_path / "worker"
    while not worker.exists() or not worker.read_text():
        assert running.exit_status() is None, (tmp_path / "hangs.log").read_text()
        time.sleep(0.05)
    running.kill()
    assert (running.record()["results"], running.exit_status()) == ({"found": 1}, -9)
    status = Path(f"/proc/{worker.read_text()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, "passed"), (AssertionError("a bit"), "failed"), (UnavailableError("no"), "skipped")],
)
def test_a_stage_leaves_a_record_and_if_it_passed_its_hashes(tmp_path, monkeypatch, raised, status):
    def run(context):
        context.results["verified"] = {"hash": "kernel"}
        if raised is not None:
            raise raised

    written = []
    monkeypatch.setitem(sys.modules, "a_stage", SimpleNamespace(run=run))
    monkeypatch.setattr(records, "write_shipped", lambda *row: written.append(row))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
    runner.run_stage("a_stage:run", "cuda", "0", tmp_path / "out.json")
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["status"], record["results"]) == (status, {"verified": {"hash": "kernel"}})
    assert str(raised or "") in (record["error"] or "")
    assert written == [("GPU X", {"hash": "kernel"})] * (raised is None)


def test_without_a_gpu_the_command_prints_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tools.gpu"])
    assert command.main() == 1
    assert capsys.readouterr().out.startswith("make gpu needs a CUDA device, and torch")
