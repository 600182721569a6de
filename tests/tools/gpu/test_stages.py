"""The stages of `make gpu` that this folder's other tests leave out, without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tools.gpu import apply, child, programs, sweep, verified
from tools.gpu import compile as compiling
from tools.gpu.stages import FAILED, PASSED, ROOT, SKIPPED, Context, UnavailableError
from txl_kernels.backends.triton import launch_table, launching


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
    assert len(small) == len(set(small)) < len(large) == len(set(large)) == sweep.MOST


@pytest.mark.slow
def test_the_launches_of_the_first_call_are_known_in_advance():
    names = [name for name, _ in compiling.launches(compiling.REHEARSED)]
    swept = [name.startswith("sweep/") for name in names]
    assert swept == sorted(swept)
    assert sum(swept) == 6 * sweep.MOST
    for call in ("train_d64", "train_d128", "parakeet_10min", "inkling_global"):
        assert f"rel_attention/bfloat16/{call}/rel_attention_fwd" in names


def test_kernels_that_were_launched_are_recorded_with_their_hash(monkeypatch):
    ran = []
    site = SimpleNamespace(launch=lambda kernel, *_, **__: ran.append(kernel))
    monkeypatch.setitem(sys.modules, "txl_kernels.a_launch_site", site)
    monkeypatch.setattr(launching, "launch", site.launch)
    monkeypatch.setattr(launching, "current_target", lambda: "sm_90")
    monkeypatch.setattr(launching, "specialise", lambda kernel, *_: kernel)
    monkeypatch.setattr(launching, "kernel_hash", lambda kernel: f"hash of {kernel.__name__}")
    with verified.launched() as found:
        site.launch(test_candidates_fit_in_shared_memory, (1,), x=2)
    name = test_candidates_fit_in_shared_memory.__name__
    assert (found, len(ran)) == ({f"hash of {name}": name}, 1)
    assert site.launch is launching.launch


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


def test_a_program_that_hangs_is_ended_and_its_output_kept():
    call = "import time; print('seen', flush=True); time.sleep(600)"
    assert programs.run_program([sys.executable, "-c", call], 1.0) == (None, "seen\n")


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, PASSED), (AssertionError("a bit differs"), FAILED), (UnavailableError("no"), SKIPPED)],
)
def test_a_stage_leaves_a_record_in_any_case(tmp_path, monkeypatch, raised, status):
    def run(context):
        context.results["found"] = context.ceilings["rate"]
        if raised is not None:
            raise raised

    monkeypatch.setitem(sys.modules, "a_stage", SimpleNamespace(run=run))
    child.main("a_stage:run", tmp_path / "out.json", 0.0, "cpu", {"rate": 2.0})
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["status"], record["results"]) == (status, {"found": 2.0})
    assert str(raised or "") in (record["error"] or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_in_one_sentence():
    command = [sys.executable, "-m", "tools.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "make gpu needs a CUDA device" in done.stdout
