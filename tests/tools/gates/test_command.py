"""`python -m tools.gates`: the launches that it compiles, its report and its exit status."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from txl_kernels.backends import triton as package

if package.interprets() or not package._is_installed():
    pytest.skip("a process interprets or compiles", allow_module_level=True)

import triton
import triton.language as tl

from tools.gates import __main__ as command
from tools.gates import shipped, spills
from txl_kernels.backends.triton import launch_table
from txl_kernels.backends.triton.launching import launch


@triton.jit
def _copy_kernel(p_x, p_out, BLOCK: tl.constexpr, IS_WRONG: tl.constexpr):
    tl.static_assert(not IS_WRONG, "planted")
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_x + o))


def copies(is_wrong: bool) -> None:
    x = torch.empty(64, device="meta")
    launch(_copy_kernel, (1,), x, x, BLOCK=64, IS_WRONG=is_wrong)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command for two calls, of which one does not compile and is not in CI's part."""
    calls = [
        shipped.Call("copy/planted", False, lambda: copies(True)),
        shipped.Call("copy/sound", True, lambda: copies(False)),
    ]
    monkeypatch.setattr(shipped, "shipped_calls", lambda: calls)

    def run(*arguments):
        status = command.main(["--processes", "1", "--arch", "80", *map(str, arguments)])
        return status, " ".join(capsys.readouterr().out.split())

    return run


def test_sound_launches_pass_and_are_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CHECKED_TRITON_VERSIONS", ("0.0",))
    status, said = run("--headline", "--json", tmp_path / "rows.json")
    assert status == 0
    assert f"Triton {triton.__version__} is not among the checked versions (0.0)." in said
    assert f"1 compilations with Triton {triton.__version__}" in said
    row = {"launch": "copy/sound/copy", "arch": 80, "triton": triton.__version__}
    assert json.loads((tmp_path / "rows.json").read_text()) == [row | {"shared": 0, "spills": 0}]


def test_a_kernel_that_does_not_compile_is_named(run):
    status, said = run()
    assert status == 1
    assert "2 compilations" in said
    assert "failed copy/planted/copy on sm_80: does not compile: CompileTimeAssertionFail" in said


def test_an_exception_that_no_launch_needs_fails_complete_runs_only(run, monkeypatch):
    monkeypatch.setattr(spills, "SPILLS", (spills.Spill("copy/.*", (80,), 800, "planted"),))
    assert "failed no launch needs this entry of the table of spills: copy/.*" in run()[1]
    assert run("--headline")[0] == 0


def test_a_run_without_a_launch_fails(run):
    assert run("--only", "no_such_call")[0] == 1


def test_the_shipped_calls_use_every_row_of_the_launch_table(monkeypatch):
    planted = launch_table.Key("rel_attention_fwd", "99KiB", "planted")
    rows, used = {**launch_table.rows(), planted: None}, set()
    noted = SimpleNamespace(get=lambda key: used.add(key) or rows.get(key))
    monkeypatch.setattr(launch_table, "rows", lambda: noted)
    calls = shipped.shipped_calls()
    assert len({call.name for call in calls}) == len(calls)
    for arch in (80, 86, 90):  # one of each class
        with shipped.recording(arch):
            for call in calls:
                call.run()
    assert {key for key in rows if key.launch_class != "interpreter"} - used == {planted}
