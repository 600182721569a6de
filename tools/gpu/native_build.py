"""Builds the native part with its CUDA kernels, for this machine's GPU alone."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig

import torch

from tools.gpu.programs import find_program, run_program, tail
from tools.gpu.stages import BUILD, ROOT, Context, UnavailableError

PACKAGE = ROOT / "txl_kernels"


def build(context: Context) -> str:
    """Builds outside the package, then replaces its files; returns a line about the build.

    A rehearsal configures a build without CUDA and compiles nothing.

    Raises:
        RuntimeError: the build failed; with the last lines that the tools printed.
    """
    folder = BUILD / f"native-{sysconfig.get_config_var('SOABI')}"
    try:
        cmake, ninja = find_program("cmake"), find_program("ninja")
        cuda = "OFF" if context.is_rehearsal else find_program("nvcc") and "ON"
    except UnavailableError as reason:
        return f"native part not built: {reason}"
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"),
        *(f"-DTXL_OUTPUT_DIR={folder / 'built'}", f"-DTXL_CUDA={cuda}"),
        f"-DTXL_CUDA_ARCHITECTURES={_architecture(context.device)}",
    ]
    make = [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())]
    for step in (configure, [*make, "--target", "help"] if context.is_rehearsal else make):
        status, printed = run_program(step, context.seconds_left() - 1)
        if status is None:
            return "native part not built: time ran out"
        if status != 0:
            raise RuntimeError(f"the native build failed:\n{tail(printed, 20)}")
    if context.is_rehearsal:
        return "native part configured"
    for file in sorted((folder / "built").iterdir()):  # _C before its record
        partial = PACKAGE / f".{file.name}"
        shutil.copy(file, partial)
        partial.replace(PACKAGE / file.name)
    return "native part built"


def _architecture(device: torch.device) -> str:
    """As CMake writes it; Hopper's own instructions need the suffix "a"."""
    if device.type == "cpu":
        return "80-real"
    major, minor = torch.cuda.get_device_capability(device)
    return "90a-real" if major == 9 else f"{major}{minor}-real"
