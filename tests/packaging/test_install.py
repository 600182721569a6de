"""Builds and installs on machines that lack something: they succeed and leave the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path("txl_kernels") / "_native_build.json"
SHIPPED = ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py")

pytestmark = pytest.mark.slow_build
for module in ("pybind11", "setuptools"):
    pytest.importorskip(module)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the package is built from, without anything built."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in SHIPPED:
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "python", "txl_kernels"):
        built = shutil.ignore_patterns("_C.*", RECORD.name, "__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    return copy


def tool(name: str) -> str:
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return shutil.which(name, path=places) or pytest.skip(f"needs {name}")


@pytest.fixture
def path_without_compiler(tmp_path: Path) -> str:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cmake", "env", "ninja", "sh", "uname"):
        (folder / name).symlink_to(tool(name))
    return str(folder)


def install(sources: Path, target: Path, *options: str, **env: str) -> dict:
    """Installs into the folder `target` and returns the build record that it got."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    plain = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    subprocess.run(
        [*pip, "--no-build-isolation", "--no-deps", "--target", target, *options, sources],
        env={**plain, **env},
        check=True,
    )
    return json.loads((target / RECORD).read_text(encoding="utf-8"))


def test_install_without_a_compiler_succeeds_and_says_so(sources, tmp_path, path_without_compiler):
    record = install(sources, tmp_path / "site", PATH=path_without_compiler)
    assert not record["built"]
    assert "no C++ compiler" in record["reason"]

    ask = "from txl_kernels.backends import native; print(native.unavailable_reason())"
    answer = subprocess.run(
        [sys.executable, "-S", "-c", ask],
        env={"PYTHONPATH": f"{tmp_path / 'site'}:{':'.join(sys.path)}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no C++ compiler" in answer.stdout


def test_install_without_torch_succeeds_and_says_so(sources, tmp_path):
    """The interpreter that the config setting names has no torch: isolated, it sees no packages."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    record = install(
        sources, tmp_path / "site", f"--config-settings=--global-option=--torch-python={bare}"
    )
    assert not record["built"]
    assert "torch was not found" in record["reason"]


def configure(
    tmp_path: Path, *options: str, version: str = "2.13.0", cuda: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Configures for a torch that is a version number and nothing else."""
    torch_dir = tmp_path / "torch"
    torch_dir.mkdir()
    lines = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
    (torch_dir / "version.py").write_text(lines)
    command = [
        *(tool("cmake"), "-S", ROOT, "-B", tmp_path / "build"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DTXL_TORCH_DIR={torch_dir}",
        f"-DTXL_OUTPUT_DIR={tmp_path / 'txl_kernels'}",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("option", ["OFF", "AUTO"])
def test_without_a_cuda_torch_there_are_no_cuda_kernels_and_the_reason_is_said(tmp_path, option):
    run = configure(tmp_path, f"-DTXL_CUDA={option}")
    assert run.returncode == 0, run.stderr
    reason = {"OFF": "TXL_CUDA=OFF", "AUTO": "torch 2.13.0 is built without CUDA"}[option]
    assert f"No CUDA kernels: {'the build was told ' * (option == 'OFF')}{reason}" in run.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"option": "ON"}, "TXL_CUDA=ON: torch 2.13.0 is built without CUDA"),
        ({"option": "ON", "version": "2.10.0"}, "TXL_CUDA=ON: it needs torch 2.11"),
        ({"option": "ON", "cuda": "11.8"}, "torch of 11.8"),
        ({"option": "yes"}, "TXL_CUDA must be AUTO, ON, OFF or COMPILE_ONLY, got yes"),
    ],
    ids=["no_cuda_torch", "old_torch", "another_cuda", "unknown"],
)
def test_cuda_on_without_what_it_needs_fails_loudly(tmp_path, options, named):
    if "cuda" in options:
        tool("nvcc")
    run = configure(tmp_path, f"-DTXL_CUDA={options.pop('option')}", **options)
    assert run.returncode != 0
    assert named in " ".join(run.stderr.split())


@pytest.mark.parametrize(("cuda", "built"), [("13.0", True), ("11.8", False)])
def test_auto_goes_by_the_toolchain(tmp_path, cuda, built):
    """A GPU is not asked for: this runs without one."""
    version = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True).stdout
    if built and "release 13." not in version:
        pytest.skip("needs nvcc of CUDA 13")
    run = configure(tmp_path, cuda=cuda)
    assert run.returncode == 0, run.stderr
    assert ("No CUDA kernels" not in run.stdout) == built


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117"])
def test_a_torch_too_old_is_a_reason(tmp_path, version):
    run = configure(tmp_path, version=version)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert not record["built"]
    assert version in record["reason"]
