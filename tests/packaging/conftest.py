"""Copies of the sources, and builds of them that stop before anything is compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path("txl_kernels") / "_native" / "build.json"  # of a build without a library
SHIPPED = (
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "THIRD_PARTY_NOTICES",
    "build_target.py",
    "pyproject.toml",
    "setup.py",
)
COMPILER = ("ar", "as", "c++", "g++", "ld", "ranlib")
COMPILER_VARIABLES = ("CC", "CXX", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS")
TARGET_VARIABLES = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the files that the package is built from, without anything built."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in SHIPPED:
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "python", "txl_kernels"):
        built = shutil.ignore_patterns("_C.*", "_native*", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    return copy


def find_tool(name: str) -> str:
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return shutil.which(name, path=places) or pytest.skip(f"needs {name}")


@pytest.fixture
def tool() -> Callable[[str], str]:
    """Finds a program, or skips the test."""
    return find_tool


@pytest.fixture
def path_without_compiler(tmp_path: Path) -> str:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cmake", "env", "ninja", "sh", "uname"):
        (folder / name).symlink_to(find_tool(name))
    return str(folder)


@pytest.fixture
def path_without_python(path_without_compiler: str) -> str:
    for name in COMPILER:
        (Path(path_without_compiler) / name).symlink_to(find_tool(name))
    return path_without_compiler


@pytest.fixture
def build_python(tmp_path: Path) -> str:
    """An installer's own interpreter: it has the packages that the build requires, and no torch."""
    prefix = tmp_path / "build environment"
    venv.create(prefix, symlinks=True)
    version = f"python3.{sys.version_info.minor}"
    for name in ("_distutils_hack", "pybind11", "setuptools"):
        package = Path(pytest.importorskip(name).__file__).parent
        (prefix / "lib" / version / "site-packages" / name).symlink_to(package)
    return str(prefix / "bin" / "python")


@pytest.fixture
def fake_environment(tmp_path: Path) -> Path:
    """An environment of this Python whose torch is a version number, too old to build for."""
    prefix = tmp_path / "target"
    venv.create(prefix, symlinks=True)
    version = f"python3.{sys.version_info.minor}"
    torch = prefix / "lib" / version / "site-packages" / "torch"
    torch.mkdir()
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("__version__ = '2.0.1'\n")
    return prefix


@pytest.fixture
def setup_build(
    sources: Path, build_python: str, path_without_python: str, tmp_path: Path
) -> Callable[..., tuple[subprocess.CompletedProcess[str], dict | None]]:
    """Runs setup.py as uv and build do; returns the finished process and the record of why
    there is no library."""

    def build(
        *options: str, checkout: Path = sources, path: str = path_without_python, **env: str
    ) -> tuple[subprocess.CompletedProcess[str], dict | None]:
        hidden = (*COMPILER_VARIABLES, *TARGET_VARIABLES)
        plain = {name: value for name, value in os.environ.items() if name not in hidden}
        output = tmp_path / "output"
        command = [build_python, "setup.py", *options, "build_ext", "--build-lib", str(output)]
        done = subprocess.run(
            command,
            cwd=checkout,
            env={**plain, "PATH": path, **env},
            capture_output=True,
            text=True,
        )
        record = output / RECORD
        return done, json.loads(record.read_text("utf-8")) if record.exists() else None

    return build


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Configures for a torch that is a version number and nothing else."""

    def run(
        *options: str, version: str = "2.13.0", cuda: str | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        torch_dir = tmp_path / "torch"
        torch_dir.mkdir(exist_ok=True)
        lines = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
        (torch_dir / "version.py").write_text(lines)
        os.utime(torch_dir / "version.py", (0, 0))
        command = [
            *(find_tool("cmake"), "-S", ROOT, "-B", tmp_path / "build"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTXL_TORCH_DIR={torch_dir}",
            f"-DTXL_OUTPUT_DIR={tmp_path / 'txl_kernels'}",
            *options,
        ]
        plain = {name: x for name, x in os.environ.items() if name not in COMPILER_VARIABLES}
        return subprocess.run(command, env={**plain, **env}, capture_output=True, text=True)

    return run
