"""The runner of `make gpu`: a stage that fails, hangs or breaks its process stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import child, machine, stages
from benchmarks.gpu.stages import FAILED, PASSED, UNAVAILABLE

CHILD = """
import os, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.stages import write_json
stage, path = sys.argv[1], Path(sys.argv[2])
if stage == "hangs":
    write_json(path, {"status": "failed", "error": "it did not finish", "results": {"found": 1}})
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["WORKER"]).write_text(str(worker.pid))
    time.sleep(600)
if stage == "breaks":
    os.abort()
if stage == "breaks_late":
    write_json(path, {"status": "passed", "error": None, "results": {"found": 2}})
    os.abort()
if stage == "says":
    write_json(path, {"status": "passed", "error": None, "results": {
        "interprets": "TRITON_INTERPRET" in os.environ}})
"""


@pytest.fixture
def run_stage(tmp_path, monkeypatch):
    """`stages.run_stage` with stages that do what their names say."""
    (tmp_path / "scripted_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("WORKER", str(tmp_path / "worker"))
    return lambda name, seconds=60.0: stages.run_stage(name, seconds, "scripted_child")


def test_what_a_stage_found_is_kept(run_stage, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    record = run_stage("says")
    assert (record["status"], record["error"]) == (PASSED, None)
    assert record["results"] == {"interprets": False}


def test_a_stage_that_breaks_its_process_has_failed(run_stage):
    record = run_stage("breaks")
    assert record["status"] == FAILED
    assert "status -6" in record["error"]


def test_a_stage_that_breaks_behind_its_last_word_has_failed_too(run_stage):
    record = run_stage("breaks_late")
    assert (record["status"], record["results"]) == (FAILED, {"found": 2})


def test_a_stage_that_leaves_no_record_has_failed(run_stage):
    assert run_stage("silent")["error"] == "it left no record"


def test_a_stage_that_hangs_is_ended_with_its_workers(run_stage, tmp_path):
    record = run_stage("hangs", 10.0)
    assert (record["status"], record["results"]) == (FAILED, {"found": 1})
    assert record["error"] == "not done after 10 s"
    worker = int((tmp_path / "worker").read_text())
    for _ in range(50):
        if not _lives(worker):
            return
        time.sleep(0.1)
    pytest.fail("its worker lives on")


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_failing_stage_does_not_stop_the_later_ones(monkeypatch, tmp_path):
    written = []

    def run_stage(name, _seconds):
        status = FAILED if name == "parity" else PASSED
        return {"status": status, "seconds": 1.0, "error": None, "results": {}}

    def write_json(path, report):
        written.append(list(report["stages"]))

    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(stages, "write_json", write_json)
    report = stages.run_all(stages.NAMES, tmp_path / "out.json", {"gpu": "one"})
    assert list(report["stages"]) == list(stages.NAMES)
    assert written == [list(stages.NAMES[:n]) for n in range(1, len(stages.NAMES) + 1)]
    assert stages.exit_status(report) == 1


def test_no_stage_gets_more_than_what_is_left(monkeypatch, tmp_path):
    given = []

    def run_stage(_name, seconds):
        given.append(seconds)
        return {"status": PASSED, "seconds": 0.0, "error": None, "results": {}}

    monkeypatch.setattr(stages, "run_stage", run_stage)
    stages.run_all(stages.NAMES, tmp_path / "out.json", {}, total=100.0)
    assert all(seconds <= 100 for seconds in given)


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ({"build": PASSED, "parity": PASSED, "sanitizer": UNAVAILABLE}, 0),
        ({"build": PASSED, "parity": FAILED}, 1),
        ({"build": PASSED, "parity": UNAVAILABLE, "timings": UNAVAILABLE}, 1),  # nothing proven
    ],
)
def test_exit_status(states, status):
    report = {"stages": {name: {"status": state} for name, state in states.items()}}
    assert stages.exit_status(report) == status


def test_a_document_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "out.json"
    stages.write_json(path, {"a": 1})
    stages.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [file.name for file in path.parent.iterdir()] == ["out.json"]


def test_a_stage_writes_what_it_found_before_it_failed(tmp_path, monkeypatch):
    class Stage:
        @staticmethod
        def run(results, save):
            results["found"] = 3
            save()
            raise AssertionError("a bit differs")

    monkeypatch.setitem(sys.modules, "benchmarks.gpu.scripted", Stage)
    child.main("scripted", tmp_path / "out.json")
    record = json.loads((tmp_path / "out.json").read_text())
    assert record == {
        "status": FAILED,
        "error": "AssertionError: a bit differs",
        "results": {"found": 3},
    }


def test_the_machine_is_described_without_a_gpu():
    described = machine.describe()
    assert described["torch"]
    assert described["date"].endswith("+00:00")
    assert json.dumps(described)


@pytest.mark.slow
def test_without_a_gpu_every_stage_says_so(tmp_path):
    """All but the build, which the package's own tests do."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    names = [name for name in stages.NAMES if name not in ("build", "timings")]
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--only", *names, "--out", str(out)],
        cwd=stages.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "train_d64/forward: useful TFLOP/s" in done.stdout
    for name, record in json.loads(out.read_text())["stages"].items():
        assert record["status"] == UNAVAILABLE, (name, record)
        assert "no CUDA device" in record["error"]
