"""The command: what it compiles, what it writes, and that a failure is its exit status."""

from __future__ import annotations

import sys

import pytest

from txl_kernels.testing.aot import __main__ as command
from txl_kernels.testing.aot import gates, model, nvcc, shipped, survey


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command; what it compiles is noted, and written into a table of its own."""
    compiled, written = [], []

    def note(calls, arches):
        compiled.append((calls[0].name, arches[0]))
        return []

    monkeypatch.setattr(survey, "survey", note)
    monkeypatch.setattr(survey, "TABLE", tmp_path / "inner_loops.json")
    monkeypatch.setattr(survey, "triton_version", lambda: gates.TRITON_VERSIONS[0])
    monkeypatch.setattr(nvcc, "compiler", lambda: None)
    monkeypatch.setattr(model, "write", lambda found, version: written.append(version))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["aot", *arguments])
        return command.main(), compiled, written

    return run


def test_gates_compile_everything_and_write_nothing(run, tmp_path):
    status, compiled, written = run("gates")
    assert (status, written) == (0, [])
    names = [call.name for call in shipped.shipped_calls()]
    assert compiled == [(name, arch) for name in names for arch in shipped.ARCHITECTURES]
    assert not (tmp_path / "inner_loops.json").exists()


def test_model_compiles_only_what_stands_in_it(run, tmp_path):
    _, compiled, written = run("model")
    modelled = [call.name for call in shipped.shipped_calls() if call.modelled]
    assert compiled == [(name, 90) for name in modelled]
    assert written == [
        f"Triton {gates.TRITON_VERSIONS[0]} and no nvcc (decoding in CUDA is left out)"
    ]
    assert not (tmp_path / "inner_loops.json").exists()


def test_a_part_renews_its_rows_and_not_the_model(run):
    survey.write_table(gates.TRITON_VERSIONS[0], {"kept": {"loop": 1}})
    _, compiled, written = run("renew", "train_d64/backward")
    assert {name.rpartition("/")[0] for name, _ in compiled} >= {"rel_attention/bfloat16/train_d64"}
    assert all("train_d64/backward" in name for name, _ in compiled)
    assert written == []
    assert survey.read_table() == {gates.TRITON_VERSIONS[0]: {"kept": {"loop": 1}}}


def test_the_model_of_a_part_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("model", "train_d64")
    assert "of all launches" in capsys.readouterr().err


def test_what_cannot_be_compiled_is_named_and_fails(run, monkeypatch, capsys):
    def fail(_calls, _arches):
        raise ValueError("no such thing")

    monkeypatch.setattr(survey, "survey", fail)
    status, _, _ = run("gates", "one_query")
    assert status == 1
    said = capsys.readouterr().out
    assert (
        "FAILED rel_attention/bfloat16/one_query/forward/sm_90: ValueError: no such thing" in said
    )
