"""Builds the native part with its CUDA kernels, for this machine's GPU alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig

import torch

from tools.gpu import command
from tools.gpu.stages import BUILD, ROOT, Context

PACKAGE = ROOT / "txl_kernels"
RECORD = "_native_build.json"


def build(context: Context) -> str:
    """Builds into `BUILD` and then replaces the files in the package; returns a line about them.

    In a rehearsal it configures a build without CUDA, and compiles nothing.

    Raises:
        UnavailableError: cmake, nvcc or pybind11 is missing.
        RuntimeError: the build failed; with the last lines that the tools printed.
    """
    rehearsal = context.device.type == "cpu"
    folder = BUILD / f"native-{sysconfig.get_config_var('SOABI')}"
    cmake, ninja = command.find("cmake"), command.find("ninja")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DTXL_OUTPUT_DIR={folder / 'built'}",
        f"-DTXL_CUDA={'OFF' if rehearsal else 'ON'}",
    ]
    if not rehearsal:
        command.find("nvcc")
        configure.append(f"-DTXL_CUDA_ARCHITECTURES={_architecture(context.device)}")
    make = [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())]
    for step in (configure, [*make, "--target", "help"] if rehearsal else make):
        status, printed = command.run(step, context.seconds_left())
        if status != 0:
            raise RuntimeError(f"the native build failed:\n{command.tail(printed, 20)}")
    if rehearsal:
        return "configured"
    built = folder / "built"
    for file in (*built.glob("_C.*.so"), built / RECORD):
        partial = PACKAGE / f".{file.name}"
        shutil.copy(file, partial)
        partial.replace(PACKAGE / file.name)
    return f"built: {json.loads((PACKAGE / RECORD).read_text('utf-8'))}"


def _architecture(device: torch.device) -> str:
    """As CMake writes it; Hopper's own instructions need the suffix "a"."""
    major, minor = torch.cuda.get_device_capability(device)
    return "90a-real" if major == 9 else f"{major}{minor}-real"
