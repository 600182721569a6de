"""Build the distributions of a release: the wheel for Linux, the wheel for every system, the sdist.

The wheel for Linux contains the operator library once for each version of torch, and the module _C
once for each Python. pip downloads torch's wheels once; their headers and libraries are kept
under build/. Needs g++ and, for each Python, its headers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tools.wheels import checks, distributions, native, pythons, torches

_WORK = native.ROOT / "build" / "wheels"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a check fails; then no file is written."""
    options = _options(arguments)
    epoch = _epoch()
    chosen = pythons.named(options.python) if options.python else pythons.found()
    torch_dirs = [torches.unpack(torch, _WORK / "torch") for torch in options.torch]
    with tempfile.TemporaryDirectory(dir=_WORK) as folder:
        prebuilt = Path(folder, "prebuilt")
        failures = _compile(torch_dirs, chosen, prebuilt, options.jobs)
        if failures:
            print("\n".join(failures), file=sys.stderr)
            return 1
        finished = Path(folder, "finished")
        finished.mkdir()
        sdist = distributions.build_sdist(native.ROOT, finished, epoch)
        distributions.build_pure_wheel(sdist, finished, epoch)
        distributions.build_native_wheel(sdist, prebuilt, finished, epoch)
        options.output.mkdir(parents=True, exist_ok=True)
        for path in sorted(finished.iterdir()):
            target = options.output / path.name
            shutil.move(path, target)
            _describe(target)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.wheels", description=__doc__)
    parser.add_argument(
        "--torch",
        nargs="+",
        required=True,
        metavar="VERSION",
        help="versions of torch, one for each minor version; or paths of its wheels",
    )
    parser.add_argument(
        "--python",
        nargs="+",
        metavar="PATH",
        help="interpreters to build _C for (default: those of 3.10 to 3.14 on PATH or in pyenv)",
    )
    parser.add_argument("--output", type=Path, default=native.ROOT / "dist", metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time (default: 1)")
    return parser.parse_args(arguments)


def _epoch() -> int:
    """The time of each file in the distributions: the variable's, or that of the last commit."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        command = ["git", "-C", str(native.ROOT), "log", "-1", "--format=%ct"]
        given = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not given.isdecimal():
        raise SystemExit(f"wheels: SOURCE_DATE_EPOCH must be seconds since 1970, got {given!r}")
    return int(given)


def _compile(
    torch_dirs: Sequence[Path], chosen: Sequence[pythons.Python], prebuilt: Path, jobs: int
) -> list[str]:
    """Fills `prebuilt` with the compiled files; returns what the checks of them found."""
    failures = []
    private = (native.ROOT, Path.home())
    for torch_dir in torch_dirs:
        version = torch_dir.parent.name
        built, cost = native.build_library(torch_dir, _WORK / "cmake" / version, jobs)
        print(f"{version}: {built.stat().st_size / 1e6:.2f} MB, {cost}", flush=True)
        failures += checks.failures(built, torch_dir, private)
        target = prebuilt / "_native" / built.parent.name
        if target.exists():
            raise SystemExit(f"wheels: --torch has {built.parent.name} twice")
        shutil.copytree(built.parent, target)
    for python in chosen:
        built, cost = native.build_module(python.path, torch_dirs[0], _WORK / "cmake" / python.abi)
        print(f"{built.name}: {built.stat().st_size / 1e6:.2f} MB, {cost}", flush=True)
        if built.name != f"_C.{python.abi}.so":
            raise SystemExit(f"wheels: expected _C.{python.abi}.so, CMake built {built.name}")
        failures += checks.failures(built, None, private)
        shutil.copy(built, prebuilt)
    return failures


def _describe(path: Path) -> None:
    """Prints size and hash of a file, and the sizes of the compiled files in a wheel."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, sha256 {digest}")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for entry in wheel.infolist():
                if entry.filename.endswith(".so"):
                    size, compressed = entry.file_size / 1e6, entry.compress_size / 1e6
                    print(f"    {entry.filename}: {size:.2f} MB, compressed {compressed:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
