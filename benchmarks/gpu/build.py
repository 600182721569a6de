"""Stage "build": the native part with CUDA, by the active Python, into the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import ROOT, UnavailableError

_CUDA = "/usr/local/cuda/bin"
# pybind11's own CMake files, where the active Python has only the headers that torch brings.
_PYBIND11_OF_TORCH = """\
function(pybind11_add_module name)
  list(REMOVE_ITEM ARGN MODULE NO_EXTRAS)
  Python_add_library(${{name}} MODULE WITH_SOABI ${{ARGN}})
  target_include_directories(${{name}} SYSTEM PRIVATE "{include}")
endfunction()
"""


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Configures with TXL_CUDA=ON, builds, and says what was built.

    Raises:
        UnavailableError: no cmake, no nvcc.
        RuntimeError: it did not build; the last lines of what the tools said.
    """
    cmake = _tool("cmake")
    if cmake is None:
        raise UnavailableError("no cmake: the native part cannot be built")
    if _tool("nvcc", _CUDA) is None and "CUDACXX" not in os.environ:
        raise UnavailableError("no nvcc: the CUDA kernels cannot be built")
    ninja = _tool("ninja")
    folder = ROOT / "build" / f"gpu-{sysconfig.get_config_var('SOABI')}"
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder), *generator),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={_pybind11(folder)}",
        "-DTXL_CUDA=ON",
    ]
    _run(configure)
    limits = (os.environ.get(name) for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"))
    jobs = next(filter(None, limits), str(os.cpu_count() or 1))
    _run([cmake, "--build", str(folder), "--parallel", jobs])
    record = json.loads((ROOT / "txl_kernels" / "_native_build.json").read_text())
    results["record"] = record
    if not record["built"]:
        raise RuntimeError(record["reason"])


def _tool(name: str, *places: str) -> str | None:
    """The active Python's own, else the first on PATH, else one in `places`."""
    path = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath), *places]
    return shutil.which(name, path=os.pathsep.join(path))


def _pybind11(folder: Path) -> str:
    """A folder with pybind11Config.cmake: pybind11's, or one of ours over torch's headers."""
    if importlib.util.find_spec("pybind11") is not None:
        command = [sys.executable, "-m", "pybind11", "--cmakedir"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    ours = folder / "pybind11-of-torch"
    ours.mkdir(parents=True, exist_ok=True)
    include = Path(torch.origin).parent / "include"
    (ours / "pybind11Config.cmake").write_text(_PYBIND11_OF_TORCH.format(include=include))
    return str(ours)


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{tail}")
