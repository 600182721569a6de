"""Finds the environment that the package is installed into, and its torch; setup.py uses it.

pip runs setup.py with the interpreter of that environment. uv and build run it with an interpreter
of their own, which has no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
OPTION = "--torch-python"
_SECONDS = 60  # an interpreter that does not answer by then is skipped
_QUESTION = """
import json, sys, sysconfig
from importlib.util import find_spec
sys.path = [entry for entry in sys.path if entry]  # without the current folder
torch = find_spec("torch")
folders = list(torch.submodule_search_locations or []) if torch else []
print(json.dumps([sysconfig.get_config_var("SOABI"), folders]))
"""


class Target(NamedTuple):
    """An interpreter and its torch; the folder is NOTFOUND, CMake's word, if no torch was found."""

    interpreter: str
    torch_dir: str


def find_target(chosen: str | None) -> Target:
    """Returns the target of the installation.

    Args:
        chosen: the interpreter that the option `--torch-python` names, or None to search for one.

    Raises:
        SystemExit: `chosen` is not an absolute path of an interpreter with torch and this ABI.
    """
    if chosen is not None:
        return _chosen_target(chosen)
    abi = sysconfig.get_config_var("SOABI")
    for interpreter in _candidates():
        its_abi, torch_dir = _ask(interpreter) or (None, None)
        if torch_dir is not None and its_abi == abi:
            return Target(interpreter, torch_dir)
    return Target("", "NOTFOUND")


def _chosen_target(path: str) -> Target:
    if not Path(path).is_absolute():
        raise SystemExit(f"setup.py: {OPTION} must be an absolute path, got {path!r}")
    if not Path(path).exists():
        raise SystemExit(f"setup.py: {OPTION}={path} does not exist")
    answer = _ask(path)
    if answer is None:
        raise SystemExit(f"setup.py: {OPTION}={path} is not a Python interpreter that runs")
    its_abi, torch_dir = answer
    abi = sysconfig.get_config_var("SOABI")
    if its_abi != abi:
        raise SystemExit(f"setup.py: {OPTION}={path} has ABI {its_abi}, the build's Python {abi}")
    if torch_dir is None:
        raise SystemExit(f"setup.py: {OPTION}={path} has no torch (install torch there first)")
    return Target(path, torch_dir)


def _candidates() -> list[str]:
    """Interpreters that may belong to the target, the most probable first."""
    on_path = _pythons(os.environ.get("PATH", os.defpath).split(os.pathsep))
    candidates = [
        sys.executable,
        *_pythons(_bin_of("VIRTUAL_ENV")),
        # uv sets VIRTUAL_ENV to its build environment; the user's own is still on PATH.
        *(python for python in on_path if (Path(python).parents[1] / "pyvenv.cfg").is_file()),
        *_pythons(_bin_of("CONDA_PREFIX")),
        *_creator(),
        *_pythons([f"{ROOT}/.venv/bin"]),  # uv's choice if no environment is active
        *on_path,
        *_pythons([f"{sys.base_prefix}/bin"]),
    ]
    return list(dict.fromkeys(candidates))


def _bin_of(variable: str) -> list[str]:
    """The folder of programs in the environment that the variable names, if it is set."""
    prefix = os.environ.get(variable)
    return [f"{prefix}/bin"] if prefix else []


def _pythons(folders: Iterable[str]) -> list[str]:
    names = ("python", "python3", f"python{sys.version_info.major}.{sys.version_info.minor}")
    found = (shutil.which(name, path=folder) for folder in folders if folder for name in names)
    return [str(Path(python).absolute()) for python in found if python is not None]


def _creator() -> list[str]:
    """The interpreter that runs `build`: it created this environment (Python 3.11 records that)."""
    config = Path(sys.prefix) / "pyvenv.cfg"
    if not (config.parent.name.startswith("build-env-") and config.is_file()):
        return []
    return re.findall(r"^command = (.+) -m venv ", config.read_text("utf-8"), re.MULTILINE)


def _ask(interpreter: str) -> tuple[str | None, str | None] | None:
    """The interpreter's ABI and torch folder (None without torch); None if it does not run."""
    try:
        answer = subprocess.run(
            [interpreter, "-c", _QUESTION],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
        abi, folders = json.loads(answer.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    with_version = (folder for folder in folders if (Path(folder) / "version.py").is_file())
    return abi, next(with_version, None)


def _environment() -> dict[str, str]:
    """This process's environment without the variables of pip's build isolation."""
    env = dict(os.environ)
    entries = env.get("PYTHONPATH", "").split(os.pathsep)
    kept = [entry for entry in entries if "pip-build-env-" not in entry]
    if kept != entries:
        env["PYTHONPATH"] = os.pathsep.join(kept)
        env.pop("PYTHONNOUSERSITE", None)
    return env
