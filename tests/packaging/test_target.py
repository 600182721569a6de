"""The build finds the environment that the package is installed into, under each installer."""

from __future__ import annotations

import json
import os
import shlex
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import build_target

ABI = sysconfig.get_config_var("SOABI")
NOWHERE = build_target.Target("", "NOTFOUND")


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., Path]:
    """Makes an environment whose interpreter answers with the given ABI and has a torch."""

    def make(name: str, abi: str = ABI, with_torch: bool = True, is_venv: bool = True) -> Path:
        prefix = tmp_path / name
        torch = prefix / "lib" / "torch"
        torch.mkdir(parents=True)
        (torch / "version.py").touch()
        if is_venv:
            (prefix / "pyvenv.cfg").touch()
        python = prefix / "bin" / "python"
        python.parent.mkdir()
        answer = json.dumps([abi, [str(torch)] * with_torch])
        python.write_text(f"#!/bin/sh\necho a line of sitecustomize\necho {shlex.quote(answer)}\n")
        python.chmod(0o755)
        return prefix

    return make


@pytest.fixture(autouse=True)
def build_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installer's own environment, without torch, as uv and build make it."""
    prefix = tmp_path / "build-env-0"
    (prefix / "bin").mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(prefix / "bin" / "python"))
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
    monkeypatch.setattr(build_target, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("PATH", str(prefix / "bin"))
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    return prefix


def of(prefix: Path, python: str = "python") -> build_target.Target:
    return build_target.Target(str(prefix / "bin" / python), str(prefix / "lib" / "torch"))


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_the_active_environment_is_found(environment, monkeypatch, variable):
    target = environment("my env")
    monkeypatch.setenv(variable, str(target))
    assert build_target.find_target(None) == of(target)


def test_the_environment_that_uv_replaces_in_virtual_env_is_found_on_path(
    environment, build_environment, monkeypatch
):
    monkeypatch.setenv("VIRTUAL_ENV", str(build_environment))
    monkeypatch.setenv("CONDA_PREFIX", str(environment("conda", is_venv=False)))
    target, system = environment("target"), environment("system", is_venv=False)
    folders = [build_environment, system, target]
    monkeypatch.setenv("PATH", os.pathsep.join(f"{folder}/bin" for folder in folders))
    assert build_target.find_target(None) == of(target)


@pytest.mark.parametrize("name", ["python", "python3", f"python3.{sys.version_info.minor}"])
def test_a_python_on_path_is_found_by_each_name(environment, monkeypatch, name):
    target = environment("system", is_venv=False)
    (target / "bin" / "python").rename(target / "bin" / name)
    monkeypatch.setenv("PATH", f"/nonexistent::{target}/bin")
    assert build_target.find_target(None) == of(target, name)


def test_the_interpreter_that_runs_build_is_found(environment, build_environment, monkeypatch):
    target = environment("not activated")
    config = f"home = /usr/bin\ncommand = {target}/bin/python -m venv {build_environment}\n"
    (build_environment / "pyvenv.cfg").write_text(config)
    assert build_target.find_target(None) == of(target)
    users_own = build_environment.rename(build_environment.with_name("env"))
    monkeypatch.setattr(sys, "prefix", str(users_own))
    assert build_target.find_target(None) == NOWHERE


def test_the_environment_in_the_checkout_is_found(environment):
    target = environment("checkout/.venv")
    assert build_target.find_target(None) == of(target)


def test_the_python_below_the_build_environment_is_found(environment):
    assert build_target.find_target(None) == NOWHERE
    target = environment("base", is_venv=False)
    assert build_target.find_target(None) == of(target)


@pytest.mark.parametrize("abi", ["cpython-39-x86_64-linux-gnu", f"{ABI}d", None])
def test_another_abi_is_passed_over(environment, monkeypatch, abi):
    target = environment("target")
    monkeypatch.setenv("VIRTUAL_ENV", str(environment("other", abi=abi)))
    monkeypatch.setenv("CONDA_PREFIX", str(target))
    assert build_target.find_target(None) == of(target)


def test_an_environment_without_torch_is_passed_over(environment, monkeypatch):
    target = environment("target")
    monkeypatch.setenv("VIRTUAL_ENV", str(environment("bare", with_torch=False)))
    monkeypatch.setenv("CONDA_PREFIX", str(target))
    assert build_target.find_target(None) == of(target)


def damaged(kind: str, path: Path) -> Path:
    """A value of VIRTUAL_ENV that is no environment, or one whose interpreter fails."""
    if kind == "link":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "file":
        path.touch()
    elif kind != "nothing":
        python = path / "bin" / "python"
        python.parent.mkdir(parents=True)
        if kind == "linked python":
            python.symlink_to("/nonexistent/python3")
        else:
            text = {"no script": "\x7fELF", "failure": "#!/bin/sh\nexit 1", "silent": "#!/bin/sh"}
            python.write_text(text.get(kind, "#!/bin/sh\necho 'no JSON'"))
            python.chmod(0o755)
    return path


KINDS = ["nothing", "link", "file", "linked python", "no script", "failure", "silent", "text"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_environment_is_passed_over(environment, monkeypatch, tmp_path, kind):
    path = damaged(kind, tmp_path / "damaged")
    target = environment("target")
    monkeypatch.setenv("VIRTUAL_ENV", str(path))
    monkeypatch.setenv("CONDA_PREFIX", str(path))
    monkeypatch.setenv("PATH", f"{path}/bin:{target}/bin")
    assert build_target.find_target(None) == of(target)


def test_the_chosen_interpreter_comes_before_all_others(environment, monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", str(environment("active")))
    target = environment("chosen")
    assert build_target.find_target(str(target / "bin" / "python")) == of(target)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nonexistent/python", "does not exist"),
        ("venv/bin/python", "must be an absolute path"),
        ("~/venv/bin/python", "must be an absolute path"),
        ("", "must be an absolute path"),
        ("{tmp_path}", "not a Python interpreter"),
        ("{bare}/bin/python", "has no torch"),
        ("{other}/bin/python", "has ABI cpython-39"),
    ],
)
def test_a_wrong_choice_is_an_error_that_names_the_option(environment, tmp_path, path, message):
    bare = environment("bare", with_torch=False)
    other = environment("other", abi="cpython-39")
    with pytest.raises(SystemExit, match=f"--torch-python.*{message}"):
        build_target.find_target(path.format(tmp_path=tmp_path, bare=bare, other=other))


def test_a_real_interpreter_answers_and_the_current_folder_is_not_its_environment(
    tmp_path, monkeypatch
):
    venv.create(tmp_path / "real", symlinks=True)
    python = str(tmp_path / "real" / "bin" / "python")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").touch()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    assert build_target._ask(python) == (ABI, None)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert build_target._ask(python) == (ABI, str(tmp_path / "torch"))
    isolated = tmp_path / "pip-build-env-x" / "overlay"
    isolated.mkdir(parents=True)
    (tmp_path / "torch").rename(isolated / "torch")
    monkeypatch.setenv("PYTHONPATH", str(isolated))
    assert build_target._ask(python) == (ABI, None)
