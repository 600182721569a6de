"""The stages of `make gpu` that this folder's other tests leave out, without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.gpu import (
    apply,
    ceilings,
    child,
    cpu_threads,
    native_build,
    programs,
    sweep,
    training,
)
from tools.gpu import compile as compiling
from tools.gpu.stages import FAILED, PASSED, SKIPPED, Context, Stage, UnavailableError
from txl_kernels.backends.triton import launch_table
from txl_kernels.backends.verification import records


@pytest.fixture
def context():
    return Context({}, lambda: None, lambda: 100.0, torch.device("cpu"), {})


@pytest.fixture
def on_sm_90(monkeypatch):
    """The stages see an H100, and calls whose time and result depend on the configuration."""
    monkeypatch.setattr(launch_table, "device_limits", lambda _: compiling.REHEARSED)
    monkeypatch.setattr(Context, "is_rehearsal", False)
    shipped = launch_table.rows().copy()

    def changed():
        return [row for key, row in launch_table.rows().items() if row != shipped[key]]

    def result():
        row = (changed() or [None])[0]
        if row is not None and row.num_stages > 2:
            raise RuntimeError("out of resources: shared memory")
        return [torch.full((4,), 2.0 if row is not None and row.BLOCK_K == 32 else 1.0)]

    monkeypatch.setattr(sweep, "attention_calls", lambda *_: [result, result])
    monkeypatch.setattr(sweep, "timer", lambda *_: lambda: 1e-3 / (1 + len(changed())))


def test_the_fastest_rows_go_into_the_table(on_sm_90, context, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "TOLERANCE", 2.0)
    sweep.run(context)
    times = context.results["times_ms"]
    assert len(times) == 6
    assert all(8 <= len(notes) <= 12 for notes in times.values())
    assert "RuntimeError: out of resources" in str(times)
    rows = context.results["rows"]
    assert len(rows) == 6
    assert "0.5 ms" in rows[0]["why"]

    stages = {"sweep": {"results": context.results}}
    result, table = tmp_path / "result.json", tmp_path / "table.json"
    result.write_text(json.dumps({"machine": {"device": "GPU X"}, "stages": stages}))
    shutil.copy(launch_table.PATH, table)
    apply.main(result, table)
    new = launch_table.read(table)
    key = launch_table.Key(sweep.FWD, "sm_90", "plain", 16, 64)
    assert new[key] != launch_table.rows()[key]
    assert sum(new[key] != row for key, row in launch_table.rows().items()) == 6
    assert "GPU X: 0.5 ms" in table.read_text()


def test_a_wrong_configuration_fails_the_sweep(on_sm_90, context):
    with pytest.raises(AssertionError, match=r"differs by 1\.0e\+00 of the norm"):
        sweep.run(context)
    assert context.results["times_ms"]


def test_candidates_fit_in_shared_memory():
    small = sweep.candidates(sweep.FWD, "99KiB", 128, 101376)
    large = sweep.candidates(sweep.FWD, "sm_90", 128, 232448)
    assert small[0] == launch_table.rows()[("rel_attention_fwd", "99KiB", "plain", 16, 128)]
    assert all(config.BLOCK_Q <= config.BLOCK_K for config in (*small, *large))
    assert len(set(small)) == len(set(large)) == sweep.MOST
    assert {(64, 64, 4, 3)} & set(large) > {(64, 64, 4, 3)} & set(small)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [ceilings, compiling, cpu_threads, training])
def test_a_stage_runs_on_a_cpu_at_tiny_shapes(stage, context, tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "BUILD", tmp_path)
    monkeypatch.setitem(training.CHANGES, "data.cache_dir", str(tmp_path))
    threads = torch.get_num_threads()
    stage.run(context)
    torch.set_num_threads(threads)
    assert context.results["summary"]


@pytest.mark.slow
def test_the_launches_of_the_first_call_are_known_in_advance():
    names = [name for name, _ in compiling.launches(compiling.REHEARSED)]
    swept = [name.startswith(("sweep/", "others/")) for name in names]
    assert swept == sorted(swept)
    assert sum(name.startswith("sweep/") for name in names) == 6 * sweep.MOST
    for call in ("train_d64", "train_d128", "parakeet_10min", "inkling_global"):
        assert f"rel_attention/bfloat16/{call}/rel_attention_fwd" in names


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ("ERROR SUMMARY: 0 errors", None),
        ("ERROR SUMMARY: 3 errors", AssertionError),
        ("Device not supported", UnavailableError),
    ],
)
def test_the_sanitizer_by_its_summary(context, monkeypatch, printed, error):
    monkeypatch.setattr(programs, "find_program", lambda name: name)
    monkeypatch.setattr(programs, "run_program", lambda *_: (0, f"1 passed\n==== {printed}\n"))
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "0")
    if error is None:
        programs.sanitizer(context)
        assert len(context.results["summary"]) == 2
    else:
        with pytest.raises(error):
            programs.sanitizer(context)


def test_a_finished_build_replaces_the_files_of_the_package(tmp_path, monkeypatch, context):
    package = tmp_path / "package"
    package.mkdir()
    (package / "_C.so").write_text("old")

    def run_program(step, _):
        output = [word for word in step if "OUTPUT_DIR" in word]
        for folder in (Path(word.partition("=")[2]) for word in output):
            folder.mkdir(parents=True)
            (folder / "_C.so").write_text("new")
            record = {"built": True, "cuda": {"built": False, "reason": "no nvcc"}}
            (folder / "_native_build.json").write_text(json.dumps(record))
        return 0, ""

    monkeypatch.setattr(Context, "is_rehearsal", False)
    monkeypatch.setattr(native_build, "BUILD", tmp_path)
    monkeypatch.setattr(native_build, "PACKAGE", package)
    monkeypatch.setattr(native_build, "find_program", lambda name: name)
    monkeypatch.setattr(native_build, "run_program", run_program)
    line = native_build.build(context)
    assert line == "native part built, without CUDA kernels: no nvcc"
    assert (package / "_C.so").read_text() == "new"
    monkeypatch.setattr(native_build, "run_program", lambda *_: (None, ""))
    assert native_build.build(context) == "native part not built: time ran out"


def test_a_program_that_hangs_is_ended_and_its_output_kept():
    call = "import time; print('seen', flush=True); time.sleep(600)"
    assert programs.run_program([sys.executable, "-c", call], 1.0) == (None, "seen\n")


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, PASSED), (AssertionError("a bit differs"), FAILED), (UnavailableError("no"), SKIPPED)],
)
def test_a_stage_leaves_a_record_in_any_case(tmp_path, monkeypatch, raised, status):
    record = run_stage(monkeypatch, tmp_path, {"found": 2}, raised)
    assert (record["status"], record["results"]) == (status, {"found": 2})
    assert str(raised or "") in (record["error"] or "")


def run_stage(monkeypatch, folder, results, raised, device="cpu"):
    """The record of a stage in this process, which saves the results and may raise."""

    def run(context):
        context.results |= results
        if raised is not None:
            raise raised

    monkeypatch.setitem(sys.modules, "a_stage", SimpleNamespace(run=run))
    for name in ("setsid", "dup2"):
        monkeypatch.setattr(os, name, lambda *_: None)
    stage = Stage("a_stage", 1, "a_stage:run")
    child.run_stage(stage, folder / "out.json", 0.0, device, {})
    return json.loads((folder / "out.json").read_text())


def test_the_hashes_of_a_passed_stage_go_into_the_package(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(records, "write_shipped", lambda *row: written.append(row))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
    for error in (AssertionError(), None):
        run_stage(monkeypatch, tmp_path, {"verified": {"hash": "kernel"}}, error, "cuda")
    assert written == [("GPU X", {"hash": "kernel"})]
