"""`make wheel` in a path with spaces; CI fails without native kernels, `.ci/run` without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from txl_kernels.backends import native

ROOT = Path(__file__).resolve().parents[2]
# Creates the files that the commands of `make wheel` would create, and writes a line for each call.
PYTHON = """#!/bin/sh
printf '[%s]' "$@" >> "$LOG"; echo >> "$LOG"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *build_sdist*) mkdir -p build/wheel; touch build/wheel/transformer_xl-0.tar.gz ;;
esac
"""
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
def test_the_wheel_is_tested_in_a_path_with_spaces(tmp_path):
    checkout = tmp_path / "a check out"
    python = checkout / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (checkout / "csrc").mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", checkout)
    command = ["make", "-o", "venv/.installed-dev", "wheel", "VENV=venv", "PYTHON=venv/bin/python"]
    log = tmp_path / "log"
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, "LOG": str(log)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *_, install, smoke = log.read_text().splitlines()
    assert "[--no-cache-dir]" in install
    assert install.endswith("[build/wheel/transformer_xl-0.tar.gz]")
    assert smoke.endswith(f"[{checkout}/tests/packaging/smoke.py]")


@needs_make
@pytest.mark.parametrize("reason", [None, "no C++ compiler was found"])
@pytest.mark.parametrize("ci", ["", "true"])
def test_native_status_fails_in_ci_alone(ci, reason, tmp_path):
    """The Makefile runs a stand-in for the backend, so that no torch is imported."""
    package = tmp_path / "txl_kernels" / "backends"
    package.mkdir(parents=True)
    (package / "native.py").write_text(f"unavailable_reason = lambda: {reason!r}\n")
    (tmp_path / "csrc").mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(tmp_path)}
    command = ["make", "native-status", "VENV=venv"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"native kernels: {reason or 'built and loaded'}" in done.stdout
    assert (done.returncode != 0) == bool(ci and reason)


@pytest.fixture
def settings_of_tests(pytestconfig):
    """The module `tests/conftest.py`."""
    return pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))


def test_ci_without_native_kernels_stops_before_the_first_test(settings_of_tests, monkeypatch):
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no C++ compiler was found")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.UsageError, match="no C\\+\\+ compiler was found"):
        settings_of_tests.pytest_configure()
    monkeypatch.delenv("CI")
    settings_of_tests.pytest_configure()


@pytest.mark.parametrize(
    ("name", "ci", "outcome"),
    [
        ("test_cuda_gates.py", "true", "failed"),
        ("test_cuda_gates.py", "", "skipped"),
        ("test_native.py", "true", "skipped"),
    ],
)
def test_ci_with_nvcc_skips_no_gate(settings_of_tests, monkeypatch, tmp_path, name, ci, outcome):
    (tmp_path / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CI", ci)
    item = SimpleNamespace(path=Path(name))
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("f", 1, "needs cuobjdump"))
    hook = settings_of_tests.pytest_runtest_makereport(item)
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert report.outcome == outcome
    if outcome == "failed":
        assert f"{tmp_path}/nvcc is installed" in report.longrepr
        assert "needs cuobjdump" in report.longrepr


@pytest.mark.parametrize("versions", [["3.9"], ["3.15", "3.14"], ["3.10"]])
def test_ci_chooses_a_supported_python(versions, tmp_path):
    """`.ci/run` in a copy of the checkout, with stand-ins for Python and make."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    (checkout / ".ci").mkdir(parents=True)
    programs.mkdir()
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci")
    supported = [version for version in versions if version in ("3.10", "3.14")]
    for version in versions:
        python = programs / f"python{version}"
        python.write_text(f"#!/bin/sh\n[ $1 = -m ] || exit {int(version not in supported)}\n")
    (programs / "make").write_text('#!/bin/sh\necho "make $@"\n')
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    for program in programs.iterdir():
        program.is_symlink() or program.chmod(0o755)
    command = [programs / "bash", checkout / ".ci" / "run"]
    environment = {"PATH": str(programs)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if supported:
        assert done.returncode == 0, done.stderr
        assert f"make ci PYTHON=python{supported[0]} VENV=build/ci-venv" in done.stdout
    else:
        assert done.returncode == 1
        assert "no Python 3.10 to 3.14 on PATH" in done.stderr
