"""The CUDA kernels as nvcc compiles them: `python -m tools.gates.cuda --arch 80 90a 120`.

Needs nvcc, no GPU. Checks registers, shared memory, memory of threads and atomics of each kernel.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.gates import sass

ROOT = Path(__file__).resolve().parents[2]
# Memory of one thread, and instructions that make the order of sums depend on timing.
FORBIDDEN = {"LDL", "STL", "ATOM", "ATOMG", "ATOMS", "RED", "REDG"}
# Registers per thread, by kernel and its template arguments: element type, head size, queries of a
# warp, alignment. All blocks have 128 threads, so a multiprocessor holds 512 // registers of them.
_REGISTERS = (
    (r"rel_shift_kernel<.*>", 80),
    (r"rel_attention_positions_kernel<.*>", 128),
    (r"rel_attention_split_kernel<.*, 1, (true|false)>", 128),
    (r"rel_attention_split_kernel<float, 256, 4, true>", 255),
    (r"rel_attention_split_kernel<.*, 4, true>", 168),
    (r"rel_attention_split_kernel<(float, 64|float, 128), 4, false>", 168),
    (r"rel_attention_split_kernel<.*, 4, false>", 255),
    (r"rel_attention_combine_kernel<.*>", 64),
)
# Shared memory of a multiprocessor for all its blocks: the least, on sm_86.
_SHARED_BYTES = 100 * 1024


def nvcc() -> str | None:
    """The path of nvcc; None if it is not installed."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build(
    folder: Path, arches: Sequence[str], targets: Sequence[str] = ("txl_cuda",)
) -> dict[tuple[str, str], sass.Code]:
    """The kernels of CMake's targets, compiled for "80", "90a" and so on, as `read` returns them.

    Raises:
        RuntimeError: CMake or a compiler fails.
    """
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        raise RuntimeError("cmake is not installed")
    architectures = "-DTXL_CUDA_ARCHITECTURES=" + ";".join(f"{arch}-real" for arch in arches)
    _run(
        *(cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DTXL_CUDA=COMPILE_ONLY", architectures, "-DTXL_WERROR=ON"),
        f"-DTXL_OUTPUT_DIR={folder}",
    )
    _run(cmake, "--build", str(folder), "--parallel", str(os.cpu_count()), "--target", *targets)
    found: dict[tuple[str, str], sass.Code] = {}
    for path in folder.rglob("*.cu.o"):
        found |= read(path)
    return found


def read(path: Path) -> dict[tuple[str, str], sass.Code]:
    """The kernels of an object file by (architecture, demangled name)."""
    found = sass.read(path)
    names = _run("c++filt", *(symbol for _, symbol in found)).splitlines()
    pairs = zip(found.items(), names, strict=True)
    return {(arch, name): code for ((arch, _), code), name in pairs}


def failures(name: str, code: sass.Code) -> list[str]:
    """One sentence for each check that fails.

    Raises:
        LookupError: the table of registers has no row for the kernel.
    """
    limit = next((n for pattern, n in _REGISTERS if re.search(pattern, name)), None)
    if limit is None:
        raise LookupError(f"no limit of registers for {name}: add a row to {__file__}")
    found = []
    if code.registers > limit:
        found.append(f"{name}: {code.registers} registers, the limit is {limit}")
    blocks = 512 // limit
    if code.shared * blocks > _SHARED_BYTES:
        found.append(f"{name}: {code.shared} bytes of shared memory in each of {blocks} blocks")
    if code.stack:
        found.append(f"{name}: {code.stack} bytes per thread are spilled")
    if forbidden := FORBIDDEN.intersection(code.opcodes):
        found.append(f"{name}: {', '.join(sorted(forbidden))}")
    return found


def main() -> int:
    """Returns the exit status: 1 if a check fails."""
    parser = argparse.ArgumentParser(prog="python -m tools.gates.cuda", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["80", "90a", "120"], metavar="SM")
    options = parser.parse_args()
    if nvcc() is None:
        parser.error("nvcc is not installed")
    with tempfile.TemporaryDirectory() as folder:
        kernels = build(Path(folder), options.arch, ("txl_cuda", "txl_cuda_ops"))
    found = [
        f"{arch}: {text}" for (arch, name), code in kernels.items() for text in failures(name, code)
    ]
    print(f"{len(kernels)} CUDA kernels compiled, {len(found)} failures", *found, sep="\n")
    return int(bool(found) or not kernels)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-5000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
