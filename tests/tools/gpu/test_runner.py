"""The runner of `make gpu`, with a clock and stages that only pretend."""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path

import pytest

from tools.gpu import runner, verdict
from tools.gpu.stages import FAILED, FIRST_CALL, MARGIN, NOT_RUN, PASSED, STAGES, Stage


class FakeClock:
    """Time passes only in `sleep`."""

    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds


@dataclasses.dataclass
class FakeStage:
    """Runs for `seconds`; "ready" is in its results after `ready` seconds."""

    seconds: float
    exit: int = 0
    ready: float = 0.0
    clock: FakeClock | None = None
    begun: float = 0.0
    killed: bool = False

    def exit_status(self):
        return self.exit if self.clock.time - self.begun >= self.seconds else None

    def record(self):
        spent = self.clock.time - self.begun
        is_done = self.exit_status() is not None
        results = {
            "seen_seconds": spent // 20 * 20,
            "ready": ["parity"] if spent >= self.ready else [],
        }
        state = (PASSED, None) if is_done else (FAILED, "it did not finish")
        return {"status": state[0], "error": state[1], "results": results}

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


@pytest.fixture
def run(tmp_path):
    """Runs the first call's stages, with changes to their script, and returns their records."""

    def run(budget=240.0, **changes):
        clock, order = FakeClock(), []
        scripts = {name: dataclasses.replace(x) for name, x in (TYPICAL | changes).items()}

        def start(stage, deadline, ceilings):
            order.append(stage.name)
            script = scripts[stage.name]
            script.clock, script.begun = clock, clock.time
            return script

        records = {}
        runner.Run(
            waiting=list(FIRST_CALL),
            ends=runner.deadlines(FIRST_CALL, 0.0, budget - MARGIN),
            records=records,
            write=lambda: run.written.append(copy.deepcopy(records)),
            start=start,
            started=0.0,
            now=clock.now,
            sleep=clock.sleep,
        ).run()
        run.order, run.end, run.scripts = order, clock.time, scripts
        return records

    run.written = []
    return run


def test_a_typical_run_follows_the_planned_timeline(run):
    found = run()
    begins = {name: record["start"] for name, record in found.items()}
    assert begins == pytest.approx(
        {"compile": 0, "ceilings": 0, "parity": 33, "timings": 73, "sweep": 143, "memory": 188},
        abs=1,
    )
    assert {record["status"] for record in found.values()} == {PASSED}
    assert run.order == [stage.name for stage in FIRST_CALL]
    assert run.end <= 240 - MARGIN


def test_the_json_is_written_when_a_stage_saves_and_when_it_ends(run):
    found = run()
    assert run.written[-1] == found
    seen = [written["timings"]["results"] for written in run.written if "timings" in written]
    assert {results["seen_seconds"] for results in seen if results} == {0, 20, 40, 60}
    finished = [[name for name, x in w.items() if "seconds" in x] for w in run.written]
    assert [len(names) for names in finished] == sorted(len(names) for names in finished)
    assert {len(names) for names in finished} == {0, 1, 2, 3, 4, 5, 6}


def test_shares_of_the_budget():
    planned = {"ceilings": 25, "compile": 75, "parity": 90, "timings": 170, "sweep": 220}
    planned["memory"] = 240 - MARGIN
    assert runner.deadlines(FIRST_CALL, 0.0, 240 - MARGIN) == pytest.approx(planned)
    assert runner.deadlines(FIRST_CALL, 5.0, 100.0)["timings"] == 100.0
    assert runner.deadlines([STAGES["ncu"]], 5.0, 305.0) == {"ncu": 305.0}


def test_what_cannot_start_in_time_is_reported(run):
    found = run(budget=100.0)
    states = {name: record["status"] for name, record in found.items()}
    assert states["sweep"] == states["memory"] == NOT_RUN
    assert found["memory"]["error"] == "no time was left"
    assert states["timings"] == FAILED  # it did not look at the time that it had left
    assert run.end <= 100.0


@pytest.mark.parametrize("name", TYPICAL)
def test_a_stage_that_hangs_is_ended_and_keeps_what_it_found(run, name):
    found = run(**{name: FakeStage(1e9, ready=1e9)})
    assert (found[name]["status"], run.scripts[name].killed) == (FAILED, True)
    assert "end of its share" in found[name]["error"]
    assert "seen_seconds" in found[name]["results"]
    assert [other for other in found if found[other]["status"] != PASSED] == [name]
    assert run.end <= 240.0


def test_a_crash_keeps_the_other_stages(run):
    found = run(parity=FakeStage(3, exit=-6))
    assert found["parity"]["status"] == FAILED
    assert "status -6" in found["parity"]["error"]
    assert [name for name in found if found[name]["status"] != PASSED] == ["parity"]
    assert verdict.exit_status({"stages": found}) == 1


def test_a_measurement_waits_for_the_compilers(run):
    found = run(parity=FakeStage(5), compile=FakeStage(70, ready=20))
    assert found["timings"]["start"] >= 70


@pytest.mark.parametrize(
    ("states", "status"),
    [([PASSED, "skipped"], 0), ([PASSED, FAILED], 1), (["skipped", NOT_RUN], 1)],
)
def test_exit_status(states, status):
    stages = {str(n): {"status": state} for n, state in enumerate(states)}
    assert verdict.exit_status({"stages": stages}) == status


def test_the_verdict_comes_first(run, capsys):
    stages = run(timings=FakeStage(3, exit=1))
    stages["parity"]["results"]["summary"] = ["ten launches"]
    machine = {"device": "GPU", "torch": "2", "triton": "3", "commit": "abc", "changed": True}
    capsys.readouterr()
    verdict.show({"stages": stages, "machine": machine, "budget": 240.0})
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[:2] == ["VERDICT: FAILED", "  failed: timings"]
    assert "  ten launches" in lines
    assert all(len(line) <= verdict.WIDTH for line in lines)


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
    child = runner.Child(Stage("hangs", 60, "hangs:run"), time.monotonic() + 60, "cpu", {})
    worker = tmp_path / "worker"
    while not worker.exists():
        assert child.exit_status() is None, (tmp_path / "hangs.log").read_text()
        time.sleep(0.05)
    child.kill()
    assert child.record()["results"] == {"found": 1}
    assert child.exit_status() == -9
    status = Path(f"/proc/{worker.read_text()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()
