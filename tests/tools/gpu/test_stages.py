"""The stages of `make gpu`, without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import headline
from benchmarks.cases.rel_attention import EAGER, FLEX, SDPA_BIAS, AttentionCase
from tools.gpu import compile as compiling
from tools.gpu import memory, parity, programs, sweep, timings
from tools.gpu.runner import FIRST_CALL, ROOT, STAGES, Context, UnavailableError
from txl_kernels.backends.triton import launch_table


@pytest.fixture
def context():
    return Context({}, lambda: None, lambda: 100.0, torch.device("cpu"))


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "tools.gpu", "--rehearse", "--budget", "2000", "--out", out]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "VERDICT: PASSED" in done.stdout
    stages = json.loads(out.read_text())["stages"]
    results = {x: record["results"] for x, record in stages.items() if record["status"] == "passed"}
    assert results.keys() >= STAGES.keys() - {"ncu", "sanitizer"}
    assert all(found["summary"] for found in results.values())
    assert results["parity"]["summary"] == ["20 of 20 calls passed"]
    assert "train_d64/forward" in results["timings"]["summary"][1]
    assert results["memory"]["wt103_large"]["mib"]["ours"] == 0


def test_the_stages_of_the_first_call_need_torch_and_triton_alone():
    absent = "yaml rich typer accelerate safetensors matplotlib tokenizers tensorboard pytest"
    code = "import sys, importlib\nfor name in sys.argv[1].split(): sys.modules[name] = None\n"
    code += "for name in sys.argv[2:]: importlib.import_module(name)"
    modules = [stage.function.partition(":")[0] for stage in FIRST_CALL]
    subprocess.run([sys.executable, "-c", code, absent, *modules], check=True, cwd=ROOT)


@pytest.mark.slow
def test_the_launches_of_the_first_call_are_known_in_advance():
    names = [x for x, _ in compiling.find_launches(compiling.headline_calls(), 90).values()]
    for name in ("train_d64", "train_d128", "inkling_global_8k", "parakeet_10min"):
        assert any(x.startswith(name) and "bwd_dqdr_kernel" in x for x in names)
    assert len(compiling.find_launches(compiling.sweep_calls(), 90)) >= 6 * 9


def test_a_failure_of_parity_is_recorded_and_the_others_run(context, monkeypatch):
    def faulty(case, *_, **__):
        assert case.D != 64, "dq: error 1 over the budget of 0.1"

    monkeypatch.setattr(parity, "check_rel_attention", faulty)
    with pytest.raises(AssertionError, match=r"train_d64/bfloat16/native: .* over the budget"):
        parity.run(context)
    assert context.results["calls"]["train_d128/bfloat16/native"].startswith("passed")
    context.seconds_left, context.results = (lambda: 0.0), {}
    with pytest.raises(AssertionError, match="nothing was compared"):
        parity.run(context)


def test_ours_is_timed_first_and_compiled_peers_last():
    plan = list(timings.plan(torch.device("cuda")))
    n = len(headline.device_cases())
    assert all(names == [] for _, names in plan[:n])
    assert plan[n][1][:2] == [EAGER, SDPA_BIAS]
    assert plan[-1][1] == [FLEX]


def test_a_wrong_call_of_ours_fails_and_time_runs_out(context, monkeypatch):
    monkeypatch.setattr(AttentionCase, "check", lambda case, name: 1 / 0)
    seconds = iter([10.0, 1.0])
    context.seconds_left = lambda: next(seconds)
    with pytest.raises(AssertionError, match="train_d64/bfloat16/forward: ZeroDivisionError"):
        timings.run(context)
    assert "backward" in context.results["stopped"]


def test_a_replay_that_ignores_its_batch_fails(context, monkeypatch):
    monkeypatch.setattr(memory, "captured", lambda step, device: lambda: None)
    with pytest.raises(AssertionError, match=r"a replayed training step differs by 1\.0e\+00"):
        memory.run(context)


def test_the_fastest_right_rows_go_into_the_table(context, tmp_path, monkeypatch):
    """On an H100 with a call whose result and time depend on the configuration."""
    shipped = launch_table.rows().copy()

    def changed():
        return [row for key, row in launch_table.rows().items() if row != shipped[key]]

    def results(*_):
        if any(row.num_warps == 8 for row in changed()):
            raise RuntimeError("out of resources: shared memory")
        return [torch.full((4,), 2.0 if any(row.BLOCK_Q == 32 for row in changed()) else 1.0)]

    monkeypatch.setattr(launch_table, "device_limits", lambda _: compiling.REHEARSED)
    monkeypatch.setattr(Context, "is_rehearsal", False)
    monkeypatch.setattr(AttentionCase, "results", results)
    monkeypatch.setattr(sweep, "sample", lambda *_: 1e-3 / (1 + len(changed())))
    sweep.run(context)
    for note in ("RuntimeError: out of resources", "differs by 1.0e+00 of the norm"):
        assert note in str(context.results["times_ms"])
    assert all(row["BLOCK_Q"] == 64 for row in context.results["rows"])
    found = {"machine": {"device": "GPU X"}, "stages": {"sweep": {"results": context.results}}}
    result, table = tmp_path / "result.json", tmp_path / "table.json"
    result.write_text(json.dumps(found))
    shutil.copy(launch_table.PATH, table)
    sweep.write_rows(result, table)
    new = launch_table.read(table)
    assert sum(new[key] != row for key, row in launch_table.rows().items()) == 6
    assert "GPU X: 0.5 ms" in table.read_text()


def test_the_sanitizer_by_its_summary(context, monkeypatch):
    output = ["ERROR SUMMARY: 0 errors"]
    monkeypatch.setattr(programs, "find_program", lambda name: name)
    monkeypatch.setattr(programs, "run_program", lambda *_: (0, output))
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "0")
    programs.sanitizer(context)
    for output in (["ERROR SUMMARY: 3 errors"], ["Device not supported"]):
        with pytest.raises(AssertionError if "SUMMARY" in output[0] else UnavailableError):
            programs.sanitizer(context)


def test_a_program_that_hangs_is_ended_and_its_output_kept():
    call = "import time; print('seen', flush=True); time.sleep(600)"
    assert programs.run_program([sys.executable, "-c", call], 1.0) == (None, ["seen"])
