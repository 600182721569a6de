"""Drives CMake, which owns every source and flag of the native part (CMakeLists.txt).

`CMAKE_ARGS` in the environment is passed on, as in `CMAKE_ARGS=-DTXL_WERROR=ON pip install .`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import ClassVar

import pybind11
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FIND_TORCH = (
    "import importlib.util as u; s = u.find_spec('torch');"
    "print(*(s and s.submodule_search_locations or []))"
)


class NativeDistribution(Distribution):
    """Adds a config setting: `pip install . -C--global-option=--torch-python=PATH`."""

    global_options: ClassVar = [
        *Distribution.global_options,
        ("torch-python=", None, "interpreter whose torch the native part is built for"),
    ]
    torch_python: str | None = None


class CMakeBuild(build_ext):
    """Builds `txl_kernels._C`, or leaves in its place the record that says why it is not built."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        target = ROOT if in_place else Path(self.build_lib).resolve()
        # One folder per Python, so that a second build from the same checkout is incremental.
        binary_dir = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        cmake, ninja = tool("cmake"), tool("ninja")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(binary_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTXL_TORCH_DIR={find_torch(self.distribution.torch_python)}",
            f"-DTXL_OUTPUT_DIR={target / 'txl_kernels'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(binary_dir)], check=True)


def tool(name: str) -> str:
    """Path of a build tool: this interpreter's own if it has one, else the first on PATH."""
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise SystemExit(
            f"setup.py: {name} not found; it is listed in pyproject.toml's build-system"
        )
    return found


def find_torch(chosen: str | None) -> str:
    """Folder of the torch package in the environment installed into, or NOTFOUND.

    pip runs this file by the target environment's interpreter; uv and build run it by one of their
    own, which has no torch, so the active virtual environment is asked next.
    """
    active = os.environ.get("VIRTUAL_ENV")
    interpreters = [chosen] if chosen else [sys.executable, active and f"{active}/bin/python"]
    for interpreter in filter(None, interpreters):
        answer = subprocess.run(
            [interpreter, "-c", FIND_TORCH],
            env=target_environment(),
            cwd=tempfile.gettempdir(),
            capture_output=True,
            text=True,
        )
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip()
    return "NOTFOUND"


def target_environment() -> dict[str, str]:
    """This process's environment without what pip's build isolation put into it."""
    env = dict(os.environ)
    entries = env.get("PYTHONPATH", "").split(os.pathsep)
    kept = [entry for entry in entries if "pip-build-env-" not in entry]
    if kept != entries:
        env["PYTHONPATH"] = os.pathsep.join(kept)
        env.pop("PYTHONNOUSERSITE", None)
    return env


setup(
    distclass=NativeDistribution,
    ext_modules=[Extension("txl_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
