"""Builds the native kernels for aarch64 and runs the op tests in QEMU's emulation."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.arm import packages, stubs, system

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "arm"
TOOLCHAIN = Path(__file__).with_name("aarch64-linux-gnu.cmake")
QEMU = "qemu-aarch64-static"
# Programs outside the repository, and Debian's packages that have them.
COMPILER = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu"}
EMULATION = {
    "aarch64-linux-gnu-readelf": "binutils-aarch64-linux-gnu",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "qemu-aarch64-static": "qemu-user-static",
    str(system.KEYRING): "debian-archive-keyring",
}
# The op tests that run native kernels. Those of torch.compile and torch.export and of other
# processes test torch's own compilers and the host; emulated, they take most of the time.
TESTS = "tests/txl_kernels/ops"
SELECTED = "native and not compil and not export and not trace and not package and not fsdp"
MARKED = "not interpreted and not gpu and not slow_build"
SOURCES = ("txl_kernels", "python", "tests", "pyproject.toml")


def main() -> int:
    args = parse(sys.argv[1:])
    if args.compile_only:
        check_requirements(COMPILER)
        compile_sources()
        return 0
    check_requirements(COMPILER | EMULATION)
    root, site = BUILD / "root", BUILD / re.sub(r"[^\w.]+", "-", " ".join(args.torch)).strip("-")
    make(root, lambda folder: system.make_root(folder, BUILD / "apt"))
    make(site, lambda folder: install(folder, root, args.torch))
    package = BUILD / "package"
    copy_sources(package)
    build_library(site / "torch", package / "txl_kernels")
    return run_tests(root, site, package, args.pytest)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.arm", description=__doc__)
    parser.add_argument(
        "--torch",
        type=shlex.split,
        default=["torch==2.13.0"],
        help="pip's arguments for torch, as one word",
    )
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="compile all sources with the headers of this Python's torch, and run nothing",
    )
    parser.add_argument(
        "pytest", nargs="*", help="pytest's arguments instead of the chosen op tests"
    )
    return parser.parse_args(arguments)


def check_requirements(requirements: dict[str, str]) -> None:
    """Stops with one sentence and the command of apt if a program or file is missing."""
    missing = [
        debian
        for name, debian in requirements.items()
        if not (shutil.which(name) or Path(name).is_file())
    ]
    if missing:
        raise SystemExit(
            f"tools.arm: {' and '.join(missing)} must be installed; this command does it on Debian "
            f"and Ubuntu: apt-get install {' '.join(missing)}"
        )


def compile_sources() -> None:
    """Compiles all sources for aarch64 with the headers of this Python's torch; links nothing.

    The compiler stops before it generates code: this check is for every change, and the headers of
    a torch for another processor are the same.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("tools.arm: torch was not found; this command installs it: make venv")
    folder = ROOT / "build" / "cross-arm"
    configure(folder, Path(spec.origin).parent, folder, "-DTXL_PARSE_ONLY=ON")
    subprocess.run([tool("cmake"), "--build", str(folder), "--target", "txl_objects"], check=True)


def make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills `folder` unless an earlier run did. An interrupted run leaves only `folder`.part."""
    if folder.exists():
        return
    print(f"making {folder}", flush=True)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part)
    part.rename(folder)


def install(folder: Path, root: Path, torch: Sequence[str]) -> None:
    packages.install(folder, torch)
    print("stubs:", *stubs.make_stubs(folder, root), flush=True)


def copy_sources(package: Path) -> None:
    """Copies the packages and tests, without this machine's native library."""
    for name in SOURCES:
        source, target = ROOT / name, package / name
        if source.is_file():
            shutil.copy2(source, target)
            continue
        shutil.rmtree(target, ignore_errors=True)
        ignored = shutil.ignore_patterns("_native", "_C.*", "__pycache__", "*.egg-info")
        shutil.copytree(source, target, ignore=ignored)


def build_library(torch: Path, package: Path) -> None:
    """Cross-compiles the operator library for this torch into `package`/_native."""
    folder = BUILD / "cmake"
    configure(folder, torch, package)
    subprocess.run([tool("cmake"), "--build", str(folder)], check=True)


def configure(folder: Path, torch: Path, output: Path, *options: str) -> None:
    """Configures a build of the library for aarch64 in `folder`; warnings are errors."""
    command = [
        *(tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}",
        f"-DTXL_TORCH_DIR={torch}",
        f"-DTXL_OUTPUT_DIR={output}",
        *("-DTXL_PYTHON_MODULE=OFF", "-DTXL_CUDA=OFF", "-DTXL_REQUIRE_NATIVE=ON"),
        *("-DTXL_WERROR=ON", *options),
    ]
    subprocess.run(command, check=True)


def tool(name: str) -> str:
    """Path of a build tool: this interpreter's own if it has one, else the first on PATH."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=places)
    if found is None:
        raise SystemExit(f"tools.arm: {name} was not found; this command installs it: make venv")
    return found


def run_tests(root: Path, site: Path, package: Path, arguments: Sequence[str]) -> int:
    """Runs pytest in the emulation and returns its exit status."""
    python = root / "usr" / "bin" / "python3.11"
    emulated = [QEMU, "-cpu", "neoverse-n1", "-L", str(root), str(python)]
    selection = [TESTS, "-m", MARKED, "-k", SELECTED]
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", *(arguments or selection)]
    env = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "default",  # torch's own kernels without SVE
        "CI": "true",  # missing native kernels are an error
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (site, package, package / "python"))),
        "PYTHONNOUSERSITE": "1",
    }
    return subprocess.run([*emulated, *pytest], cwd=package, env=env).returncode


if __name__ == "__main__":
    raise SystemExit(main())
