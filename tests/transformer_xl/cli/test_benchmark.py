"""`transformer-xl benchmark tune`: times on a GPU, ranks anywhere. Doctor on Triton's version."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from transformer_xl.cli import benchmark, doctor
from transformer_xl.cli.app import app
from txl_kernels.testing.aot import tune


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["benchmark", "tune", *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_can_be_done():
    result = run("forward")
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "no CUDA device here, so nothing can be timed" in said
    assert "--model" in said


def test_the_model_ranks_candidates_and_gives_the_row(monkeypatch, tmp_path):
    config = pytest.importorskip("triton") and tune.configurations("forward")[0]
    best = tune.Candidate(config, 1e-3, ())
    worst = tune.Candidate(config, 2e-3, ("8 bytes per thread are spilled, 0 are justified",))
    monkeypatch.setattr(tune, "rank", lambda *_: [best, worst])
    out = tmp_path / "out.json"
    result = run("forward", "--model", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "nothing was measured" in result.stdout
    row = f'FORWARD: ("sm_90", True, 64): Config({", ".join(map(str, config))}),'
    assert row in result.stdout
    assert "Written" not in result.stdout
    assert [each["failures"] for each in json.loads(out.read_text())["candidates"]] == [
        [],
        list(worst.failures),
    ]


def test_the_command_takes_every_table():
    assert get_args(benchmark.TableName) == tuple(tune.TABLES)


@pytest.mark.parametrize(("failures", "written"), [((), True), (("it spills",), False)])
def test_the_best_row_is_written_where_asked_and_sound(monkeypatch, tmp_path, failures, written):
    config = pytest.importorskip("triton") and tune.configurations("dkdv")[0]
    table = tmp_path / "rel_attention_config.py"
    before = tune.source().read_text(encoding="utf-8")
    table.write_text(before, encoding="utf-8")
    monkeypatch.setattr(tune, "rank", lambda *_: [tune.Candidate(config, 1e-3, failures)])
    monkeypatch.setattr(tune, "source", lambda: table)
    result = run("dkdv", "--model", "--write")
    assert result.exit_code == 0, result.output
    assert ("Written" in result.stdout) == written
    assert (table.read_text(encoding="utf-8") != before) == written


@pytest.mark.parametrize(
    ("version", "warned"), [("3.6.0", False), ("3.7.1", False), ("3.9.0", True)]
)
def test_doctor_warns_of_a_triton_whose_code_was_not_checked(monkeypatch, version, warned):
    monkeypatch.setattr(doctor, "_version", lambda _name: version)
    assert ("checked for 3.6.0 and 3.7.1" in doctor._triton_note()) == warned


def test_doctor_does_not_warn_of_no_triton(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda _name: doctor.NOT_INSTALLED)
    assert doctor._triton_note() == ""
