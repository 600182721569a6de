"""`python -m tools.installs`: which installations it makes, and its report of one that fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.installs import __main__ as command
from tools.installs import environments, ways

# A smoke test that passes.
WRITES = (
    "import json, pathlib, sys\n"
    "place = sys.argv[sys.argv.index('--json') + 1]\n"
    "reason = 'no compiler' if '--without-native' in sys.argv else 'yes'\n"
    "pathlib.Path(place).write_text(json.dumps({'native': reason}))\n"
)


@pytest.fixture(scope="module")
def base() -> environments.Interpreter:
    """The interpreter of the tests."""
    return environments.interpreter(Path(sys.executable))


@pytest.fixture
def result(base, tmp_path, monkeypatch):
    """The row of a way whose environment is a link to this interpreter."""

    def create(folder, *_):
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        python = folder / "bin" / "python"
        python.unlink(missing_ok=True)
        python.symlink_to(sys.executable)
        return python

    monkeypatch.setattr(command, "create", create)

    def row(install, *, smoke_test: str = "", is_native: bool = True) -> command.Row:
        script = tmp_path / "smoke.py"
        script.write_text(smoke_test)
        monkeypatch.setattr(command, "SMOKE_TEST", script)
        way = ways.Way("planted", "a planted way", install, is_native)
        return command.install(way, base, ways.Sources(*[tmp_path] * 3), tmp_path)

    return row


def origin(place, sources):
    return place.folder


def test_an_interpreter_is_asked_for_torch_and_what_torch_requires(base):
    names = {entry.name for entry in base.entries}
    assert base.torch.split("+")[0] == torch.__version__.split("+")[0]
    assert base.python == sys.version.split()[0]
    assert {"torch", "sympy", "mpmath"} <= names  # mpmath is required by sympy
    assert not {"pytest", "_pytest", "transformer_xl", "bin"} & names


def test_the_environment_has_torch_and_no_other_package_of_the_interpreter(base, tmp_path):
    run = []

    def venv(arguments, log, **_):
        run.append(arguments)
        subprocess.run([*arguments[:3], "--without-pip", *arguments[3:]], check=True)

    with pytest.MonkeyPatch.context() as patch, (tmp_path / "log").open("w") as log:
        patch.setattr(environments, "run", venv)
        python = environments.create(tmp_path / "env", base, log)
    find = "import importlib.util as u; print([bool(u.find_spec(x)) for x in ('torch', 'pytest')])"
    done = subprocess.run([python, "-I", "-c", find], capture_output=True, text=True, check=True)
    assert done.stdout == "[True, False]\n"
    assert [str(x) for x in run[0][1:3]] == ["-m", "venv"]


def test_a_passed_smoke_test_is_reported_with_its_reason(result):
    row = result(origin, smoke_test=WRITES)
    assert (row.smoke, row.native) == ("passed", "yes")
    row = result(origin, smoke_test=WRITES, is_native=False)
    assert (row.smoke, row.native) == ("passed", "no compiler")
    assert "smoke test passed  native: no compiler" in row.line()


def test_a_failed_smoke_test_is_reported_and_logged(result):
    fails = "raise SystemExit('planted failure')"
    row = result(origin, smoke_test=fails)
    assert row.smoke == "failed"
    assert "planted failure" in row.log.read_text()
    assert str(row.log) in row.native
    row = result(origin, smoke_test=f"{WRITES}{fails}")
    assert (row.smoke, row.native) == ("failed", "yes")


def test_a_failed_installation_is_reported_and_logged(result):
    def install(place, sources):
        place.pip("--no-index", place.folder / "no such folder")

    row = result(install)
    assert row.smoke == "not run: the installation failed"
    assert "no such folder" in row.log.read_text()


def test_the_first_interpreter_is_used_for_all_ways(base):
    wheel = ways.wheel_way(Path("some.whl"))
    other = base._replace(python="3.10.1")
    jobs = list(command._jobs([base, other], [wheel]))
    assert [way for way, used in jobs if used is base] == [*ways.WAYS, wheel]
    assert [way.name for way, used in jobs if used is other] == ["pip", "wheel"]
    names = [command._name(*job) for job in jobs]
    assert len(set(names)) == len(names)


def test_a_path_without_compilers_has_a_shell(tmp_path):
    path = ways.without_compiler(tmp_path)
    assert shutil.which("sh", path=path)
    assert not any(shutil.which(name, path=path) for name in ("c++", "g++", "cc", "clang++"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python", "/no/python"], "python: expected an interpreter, got /no/python"),
        (["--wheel", "/no/file.whl"], "wheel: expected a file, /no/file.whl does not exist"),
        (["--only", "conda-*"], "only: no installation has a name like 'conda-*'"),
    ],
)
def test_bad_arguments_make_nothing(tmp_path, capsys, arguments, message):
    assert command.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
