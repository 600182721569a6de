"""`transformer-xl doctor`: build command, note on Triton's version, check of all ops."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import txl_kernels
from transformer_xl.cli import doctor
from transformer_xl.cli.app import app
from txl_kernels.backends import COMPOSED, OPS, native
from txl_kernels.backends import native_installation as installation
from txl_kernels.testing.op_checks import OpCheck

REASON = "no compiler was found when txl_kernels was installed"


def check(op="rel_attention", backend="native", error=0.5, seconds=2e-3, failure=None):
    return OpCheck(
        op, backend, "cpu", torch.bfloat16, "backward", error, seconds, 3e-3, "SDPA", failure
    )


def verify(monkeypatch, *checks):
    """The result of `doctor --verify`, if the ops give these checks on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "check_ops", lambda _device: iter(checks))
    return CliRunner().invoke(app, ["doctor", "--verify"])


@pytest.mark.parametrize(
    ("reason", "helps"), [(None, False), (REASON, True), ("no product can run here", False)]
)
def test_the_command_is_shown_once_and_only_if_it_helps(monkeypatch, reason, helps):
    command = f"/a/python -m pip install --no-cache-dir '/my [sources]/{'x' * 100}'"
    for module in (native, installation):
        monkeypatch.setattr(module, "build_command", lambda: command)
    if helps:
        reason = installation.with_command(reason)
    monkeypatch.setattr(native, "unavailable_reason", lambda: reason)
    output = CliRunner().invoke(app, ["doctor"]).stdout
    assert (f"This command builds the native kernels: {command}" in output.splitlines()) == helps
    assert output.count("x" * 50) == 2 * helps


@pytest.mark.parametrize(("machine", "noted"), [("x86_64", False), ("aarch64", True)])
def test_doctor_tells_what_was_not_run_on_aarch64(monkeypatch, machine, noted):
    monkeypatch.setattr(doctor.platform, "machine", lambda: machine)
    cells = [cell for column in doctor._machine().columns for cell in column.cells]
    assert (doctor.ARM_NOTE in cells) == noted


@pytest.mark.parametrize(
    ("version", "warned"),
    [(version, False) for version in doctor.CHECKED_TRITON_VERSIONS] + [("3.99.0", True)],
)
def test_doctor_warns_of_a_triton_whose_code_was_not_checked(monkeypatch, version, warned):
    monkeypatch.setattr(doctor, "_version", lambda _name: version)
    assert ("was checked with" in doctor._triton_note()) == warned


def test_doctor_does_not_warn_of_no_triton(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda _name: doctor.NOT_INSTALLED)
    assert doctor._triton_note() == ""


def test_every_op_and_every_function_composed_of_ops_is_listed():
    table = CliRunner().invoke(app, ["doctor"]).stdout
    first_column = [line.split("│")[1].strip() for line in table.splitlines() if "│" in line]
    for name in (*OPS, *COMPOSED):
        assert hasattr(txl_kernels, name)
        assert first_column.count(name) == 1, name


def test_the_folder_of_the_records_is_shown(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/a/cache")
    output = CliRunner().invoke(app, ["doctor"]).stdout
    assert "recorded in /a/cache/transformer-xl/verified" in output


def test_checks_that_pass_end_with_status_0(monkeypatch):
    result = verify(monkeypatch, check(), check(backend="reference"))
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "rel_attention bfloat16 backward 0.50 2.00 1.50 ok" in words
    assert "native on cpu" in words
    assert "reference on cpu" in words
    assert "2 of 2 checks passed." in words
    assert "No kernel" not in words


def test_without_kernels_it_says_that_the_reference_was_checked(monkeypatch):
    result = verify(monkeypatch, check(backend="reference"))
    assert "No kernel runs on cpu here, so the reference was checked." in result.stdout


def test_a_failed_check_ends_with_status_1_and_its_reason(monkeypatch):
    failed = check(error=math.nan, seconds=None, failure="RuntimeError: out of [shared] memory")
    result = verify(monkeypatch, check(), failed)
    assert result.exit_code == 1
    words = " ".join(result.stdout.split())
    assert "rel_attention bfloat16 backward – – – FAILED" in words
    reason = "native on cpu, bfloat16, backward: RuntimeError: out of [shared] memory"
    assert f"FAILED: rel_attention, {reason}" in words
    assert "1 of 2 checks passed." in words


def test_the_table_fits_into_80_columns():
    console = Console(width=80)
    with console.capture() as capture:
        doctor.print_checks(console, [check("rel_attention, Tq 1", error=1e5, failure="wrong")])
    row = next(line for line in capture.get().splitlines() if "Tq 1 " in line)
    for cell in ("rel_attention, Tq 1", "bfloat16", "backward", "1e+05", "2.00", "FAILED"):
        assert cell in row
