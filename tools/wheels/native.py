"""The compiled files of the wheel: one operator library for each torch, one `_C` for each Python.

CMake builds both from the checkout, with the options of a wheel: `TXL_PORTABLE` for old systems,
`TXL_STRIP`, no CUDA. Object files are kept under build/, so a second build is incremental.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pybind11

ROOT = Path(__file__).resolve().parents[2]
_OPTIONS = ("-DTXL_PORTABLE=ON", "-DTXL_STRIP=ON", "-DTXL_CUDA=OFF", "-DTXL_REQUIRE_NATIVE=ON")


class Cost(NamedTuple):
    """Processor time of a build in seconds (user mode), and MiB of its largest process."""

    seconds: float
    mebibytes: float

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s of processor time, largest process {self.mebibytes:.0f} MiB"


def build_library(torch_dir: Path, binary_dir: Path, jobs: int) -> tuple[Path, Cost]:
    """Builds the operator library for one torch; its record is in the same folder."""
    output = binary_dir / "output"
    shutil.rmtree(output, ignore_errors=True)
    cost = _cmake(
        binary_dir,
        "txl_kernels",
        [
            f"-DTXL_TORCH_DIR={torch_dir}",
            f"-DTXL_OUTPUT_DIR={output}",
            "-DTXL_PYTHON_MODULE=OFF",
        ],
        jobs,
    )
    (library,) = output.glob("_native/torch-*/libtxl_kernels.so")
    return library, cost


def build_module(python: str, torch_dir: Path, binary_dir: Path) -> tuple[Path, Cost]:
    """Builds `_C` for one Python. CMake requires a torch, which `_C` does not use."""
    output = binary_dir / "output"
    shutil.rmtree(output, ignore_errors=True)
    cost = _cmake(
        binary_dir,
        "_C",
        [
            f"-DTXL_TORCH_DIR={torch_dir}",
            f"-DTXL_OUTPUT_DIR={output}",
            "-DTXL_PYTHON_MODULE=ON",
            f"-DPython_EXECUTABLE={python}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        jobs=1,
    )
    (module,) = output.glob("_C.*.so")
    return module, cost


def _cmake(binary_dir: Path, target: str, options: list[str], jobs: int) -> Cost:
    cmake, ninja = _tool("cmake"), _tool("ninja")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(binary_dir), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        *_OPTIONS,
        *options,
    ]
    build = [cmake, "--build", str(binary_dir), "--target", target, "--parallel", str(jobs)]
    # Options and compiler of an earlier configuration may no longer hold. Its object files remain:
    # ninja compiles those again whose command has changed.
    (binary_dir / "CMakeCache.txt").unlink(missing_ok=True)
    for description in (binary_dir / "CMakeFiles").glob("*/CMakeSystem.cmake"):
        shutil.rmtree(description.parent)
    binary_dir.mkdir(parents=True, exist_ok=True)
    log = binary_dir / "build.log"
    with log.open("w", encoding="utf-8") as output:
        costs = [_run(command, output.fileno(), log) for command in (configure, build)]
    return Cost(sum(cost.seconds for cost in costs), max(cost.mebibytes for cost in costs))


def _run(command: list[str], output: int, log: Path) -> Cost:
    """Runs a command with its output in the log; returns what it and its processes have used."""
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
        raise SystemExit(
            f"wheels: {command[0]} failed with status {process.returncode} (see {log})"
        )
    return Cost(usage.ru_utime, usage.ru_maxrss / 1024)


def _tool(name: str) -> str:
    """A build tool of this environment, in the version that requirements.txt names."""
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise SystemExit(f"wheels: {name} was not found: run `make wheels`, which installs it")
    return found
