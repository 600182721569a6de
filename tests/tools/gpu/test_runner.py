"""The runner of `make gpu`, with a clock and stages that only pretend."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from pathlib import Path

import pytest
import torch

from tools.gpu import __main__ as command
from tools.gpu import child, runner, verdict
from tools.gpu.stages import FAILED, FIRST_CALL, MARGIN, NOT_RUN, PASSED, SKIPPED, STAGES, Stage

MACHINE = {"device": "GPU", "torch": "2", "triton": "3", "commit": "abc", "changed": True}


@dataclasses.dataclass
class FakeStage:
    """Runs for `seconds`; lists parity as "ready" after `ready` seconds."""

    seconds: float
    exit: int = 0
    ready: float = 0.0
    spent: float = 0.0
    killed: bool = False

    def exit_status(self):
        return self.exit if self.spent >= self.seconds else None

    def record(self):
        status = (FAILED, "it did not finish") if self.exit_status() is None else (PASSED, None)
        ready = ["parity"] if self.spent >= self.ready else []
        results = {"seen": self.spent // 20 * 20, "ready": ready}
        return dict(zip(("status", "error", "results"), (*status, results), strict=True))

    def kill(self):
        self.killed = True


TYPICAL = {
    "compile": FakeStage(60, ready=33),
    "ceilings": FakeStage(8),
    "parity": FakeStage(40),
    "timings": FakeStage(70),
    "sweep": FakeStage(45),
    "memory": FakeStage(10),
}


class FakeRun:
    """The first call's stages; `changes` replace some of their scripts."""

    def __init__(self, budget=240.0, **changes):
        self.scripts = {name: dataclasses.replace(x) for name, x in (TYPICAL | changes).items()}
        self.time, self.running, self.written, self.records = 0.0, [], [], {}
        ends = runner.deadlines(FIRST_CALL, 0.0, budget - MARGIN)
        clock = {"now": lambda: self.time, "sleep": self.sleep, "started": 0.0}
        runner.Run(FIRST_CALL, ends, self.records, self.write, self.start, **clock).run()
        self.failed = [name for name, x in self.records.items() if x["status"] != PASSED]

    def sleep(self, seconds):
        self.time += seconds
        for stage in self.running:
            stage.spent += seconds

    def start(self, stage, deadline, ceilings):
        self.running.append(self.scripts[stage.name])
        return self.running[-1]

    def write(self):
        self.written.append(copy.deepcopy(self.records))


def test_a_typical_run_follows_the_planned_timeline():
    run = FakeRun()
    begins = {"compile": 0, "ceilings": 0, "parity": 33, "timings": 73, "sweep": 143, "memory": 188}
    found = {name: record["start"] for name, record in run.records.items()}
    assert found == pytest.approx(begins, abs=1)
    assert list(found) == [stage.name for stage in FIRST_CALL]
    assert (run.failed, run.time <= 240 - MARGIN) == ([], True)


def test_the_json_is_written_when_a_stage_saves_and_when_it_ends():
    run = FakeRun()
    assert run.written[-1] == run.records
    seen = [
        x["timings"]["results"]["seen"] for x in run.written if "results" in x.get("timings", {})
    ]
    assert set(seen) == {0, 20, 40, 60}
    finished = [sum("seconds" in record for record in x.values()) for x in run.written]
    assert (finished, set(finished)) == (sorted(finished), set(range(7)))


def test_shares_of_the_budget():
    planned = {"ceilings": 25, "compile": 75, "parity": 90, "timings": 170, "sweep": 220}
    found = runner.deadlines(FIRST_CALL, 0.0, 240 - MARGIN)
    assert found == pytest.approx(planned | {"memory": 240 - MARGIN})
    assert runner.deadlines(FIRST_CALL, 5.0, 100.0)["timings"] == 100.0
    assert runner.deadlines([STAGES["ncu"]], 5.0, 305.0) == {"ncu": 305.0}


def test_what_cannot_start_in_time_is_reported():
    run = FakeRun(budget=100.0)
    assert run.failed == ["timings", "sweep", "memory"]
    assert run.records["timings"]["status"] == FAILED  # it ignored the time that it had left
    assert run.records["memory"]["status"] == NOT_RUN
    assert run.time <= 100.0


@pytest.mark.parametrize("name", TYPICAL)
def test_a_stage_that_hangs_is_ended_and_keeps_its_results(name):
    run = FakeRun(**{name: FakeStage(1e9, ready=1e9)})
    record = run.records[name]
    assert (run.failed, run.scripts[name].killed) == ([name], True)
    assert "end of its share" in record["error"]
    assert "seen" in record["results"]
    assert run.time <= 240.0


def test_a_crash_keeps_the_other_stages():
    run = FakeRun(parity=FakeStage(3, exit=-6))
    assert run.failed == ["parity"]
    assert "with status -6" in run.records["parity"]["error"]


def test_measurements_wait_for_the_compilers():
    run = FakeRun(parity=FakeStage(5), compile=FakeStage(70, ready=20))
    assert run.records["timings"]["start"] >= 70


def test_the_verdict_comes_first(capsys):
    stages = FakeRun(timings=FakeStage(3, exit=1)).records
    stages["parity"]["results"]["summary"] = ["ten launches"]
    capsys.readouterr()
    verdict.show({"stages": stages, "machine": MACHINE, "budget": 240.0})
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[:2] == ["VERDICT: FAILED", "  failed: timings"]
    assert "  ten launches" in lines
    assert all(len(line) <= verdict.WIDTH for line in lines)
    for states, status in (([PASSED, SKIPPED], 0), ([PASSED, FAILED], 1), ([SKIPPED], 1)):
        records = {str(n): {"status": state} for n, state in enumerate(states)}
        assert verdict.exit_status({"stages": records}) == status


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
    monkeypatch.setattr(child.stages, "BUILD", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    running = child.Child(Stage("hangs", 60, "hangs:run"), time.monotonic() + 60, "cpu", {})
    worker = tmp_path / "worker"
    while not worker.exists() or not worker.read_text():
        assert running.exit_status() is None, (tmp_path / "hangs.log").read_text()
        time.sleep(0.05)
    running.kill()
    assert running.record()["results"] == {"found": 1}
    assert running.exit_status() == -9
    status = Path(f"/proc/{worker.read_text()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_without_a_gpu_the_command_prints_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tools.gpu", "--budget", "240"])
    assert command.main() == 1
    assert capsys.readouterr().out.startswith("make gpu needs a CUDA device, and torch")
