"""`python -m tools.gates`: the shipped calls, the failures that it reports, and its exit status."""

from __future__ import annotations

import json

import pytest
import torch

from txl_kernels.backends import triton as package

if package.interprets() or not package._is_installed():
    pytest.skip("a process interprets or compiles", allow_module_level=True)

import triton
import triton.language as tl

from tools.gates import __main__ as command
from tools.gates import checks, shipped, spills
from tools.gates.spills import Spill
from txl_kernels.backends.triton import launch_table
from txl_kernels.backends.triton.launching import launch


class NotedRows(dict):
    """A launch table that notes which of its rows are read."""

    def __init__(self, rows):
        super().__init__(rows)
        self.used = set()

    def get(self, key, default=None):
        self.used.add(key)
        return super().get(key, default)


@triton.jit
def _copy_kernel(p_x, p_out, BLOCK: tl.constexpr, IS_WRONG: tl.constexpr):
    o = tl.arange(0, BLOCK)
    if IS_WRONG:
        tl.static_assert(False, "planted")
    tl.store(p_out + o, tl.load(p_x + o))


def copies(name: str, headline: bool = False, is_wrong: bool = False) -> shipped.Call:
    x = torch.empty(64, device="meta")
    run = lambda: launch(_copy_kernel, (1,), x, x, BLOCK=64, IS_WRONG=is_wrong)  # noqa: E731
    return shipped.Call(name, run, headline)


@pytest.fixture
def calls(monkeypatch):
    """The shipped calls of the tests."""
    found = [copies("copy/sound", headline=True)]
    monkeypatch.setattr(shipped, "shipped_calls", lambda: found)
    return found


def run(capsys, *arguments):
    status = command.main(["--processes", "1", "--arch", "80", *arguments])
    return status, " ".join(capsys.readouterr().out.split())


def test_sound_launches_pass_and_are_written(calls, capsys, tmp_path):
    status, said = run(capsys, "--headline", "--json", str(tmp_path / "rows.json"))
    assert status == 0
    assert f"1 compilations with Triton {triton.__version__}" in said
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row == {
        "launch": "copy/sound/copy",
        "arch": 80,
        "triton": triton.__version__,
        "shared": 0,
        "spills": 0,
    }


def test_a_kernel_that_does_not_compile_is_named_last(calls, capsys):
    calls.insert(0, copies("copy/planted", is_wrong=True))
    status, said = run(capsys)
    assert status == 1
    assert "2 compilations" in said
    assert "failed copy/planted/copy on sm_80: does not compile: CompileTimeAssertionFail" in said
    assert run(capsys, "--only", "copy/sound")[0] == 0


def test_an_exception_that_no_launch_needs_fails_a_complete_run(calls, capsys, monkeypatch):
    monkeypatch.setattr(spills, "SPILLS", (Spill("copy/*", 80, 800, "planted"),))
    status, said = run(capsys)
    assert status == 1
    assert "an entry that no launch needs: copy/* on sm_80" in said
    assert run(capsys, "--headline")[0] == 0


def test_nothing_selected_is_a_failure(calls, capsys):
    assert run(capsys, "--only", "no_such_call")[0] == 1


def test_an_unchecked_triton_is_named(calls, capsys, monkeypatch):
    monkeypatch.setattr(command, "CHECKED_TRITON_VERSIONS", ("0.0",))
    status, said = run(capsys)
    assert status == 0
    assert f"Triton {triton.__version__} is not among the checked versions (0.0)." in said


def test_the_shipped_calls_read_every_row_of_the_launch_table(monkeypatch):
    planted = launch_table.Key("rel_attention_fwd", "99KiB", "planted")
    rows = NotedRows({**launch_table.rows(), planted: None})
    monkeypatch.setattr(launch_table, "rows", lambda: rows)
    calls = shipped.shipped_calls()
    assert len({call.name for call in calls}) == len(calls)
    assert any(call.headline for call in calls)
    for arch in (80, 86, 90):
        with shipped.recording(arch):
            for call in calls:
                call.run()
    unused = {key for key in rows if key.launch_class != "interpreter"} - rows.used
    assert unused == {planted}


def test_every_architecture_has_a_launch_class():
    found = {}
    for arch in checks.SHARED_LIMIT:
        with shipped.recording(arch):
            found[arch] = launch_table.launch_class(torch.device("cuda"))
    assert found == {
        80: "163KiB",
        86: "99KiB",
        89: "99KiB",
        90: "sm_90",
        100: "163KiB",
        120: "99KiB",
    }
