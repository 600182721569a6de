"""`transformer-xl doctor` shows the command that builds missing kernels, in one line to copy."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from transformer_xl.cli.app import app
from txl_kernels.backends import native

REASON = "no compiler was found when txl_kernels was installed"


@pytest.mark.parametrize("reason", [None, REASON])
def test_the_command_is_shown_exactly_if_there_are_no_kernels(monkeypatch, reason):
    command = f"/a/python -m pip install --no-cache-dir '/my [sources]/{'x' * 100}'"
    monkeypatch.setattr(native, "build_command", lambda: command)
    monkeypatch.setattr(native, "unavailable_reason", lambda: reason)
    lines = CliRunner().invoke(app, ["doctor"]).stdout.splitlines()
    shown = f"This command builds the native kernels: {command}"
    assert (shown in lines) == (reason is not None)
