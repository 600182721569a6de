"""Checks of a compiled file before it enters the wheel; each failure is one sentence."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

# The symbols that other files may see: the record of a library, the initialiser of a module.
_EXPORTED = {"libtxl_kernels.so": "txl_build_record", "_C": "PyInit__C"}
# torch brings the OpenMP runtime of these; a C library brings that of versioned symbols.
_OPENMP = re.compile(r"GOMP_|omp_")


def failures(path: Path, torch_dir: Path | None, private: Iterable[Path]) -> list[str]:
    """Returns the faults of a library, or of a module `_C` (`torch_dir` None), one sentence each.

    Args:
        torch_dir: the torch that the library was built for; it must define all that is missing.
        private: folders of this machine, whose paths must not be in the file.
    """
    found = []
    expected = _EXPORTED.get(path.name, _EXPORTED["_C"])
    exported = sorted(_symbols(path, "--defined-only"))
    if exported != [expected]:
        found.append(f"{path.name} must export {expected} alone, it exports {' '.join(exported)}")
    if _run("nm", str(path)).strip():
        found.append(f"{path.name} must be stripped, it has names of local symbols")
    if re.search(r"\((RPATH|RUNPATH)\)", _run("readelf", "--dynamic", str(path))):
        found.append(f"{path.name} must have no search path of libraries, it has one")
    content = path.read_bytes()
    found += [
        f"{path.name} must not contain the path {folder}, it does"
        for folder in private
        if str(folder).encode() in content
    ]
    if torch_dir is not None:
        unknown = missing_symbols(path, torch_dir)
        if unknown:
            found.append(f"{path.name} needs symbols that torch lacks: {' '.join(unknown)}")
    return found


def missing_symbols(library: Path, torch_dir: Path) -> list[str]:
    """Symbols that the library needs and that neither torch, OpenMP nor a system library defines.

    Symbols of system libraries have a version (`@`), which auditwheel checks.
    """
    needed = {
        name
        for name in _symbols(library, "--undefined-only")
        if "@" not in name and not _OPENMP.match(name)
    }
    for name in ("libtorch_cpu.so", "libc10.so"):
        needed -= _symbols(torch_dir / "lib" / name, "--defined-only")
    return sorted(needed)


def _symbols(path: Path, which: str) -> set[str]:
    """The names of dynamic symbols; those that may be undefined (kinds w and v) are left out."""
    lines = _run("nm", "--dynamic", "--with-symbol-versions", which, str(path)).splitlines()
    words = [line.split() for line in lines]
    return {re.sub(r"@@.*", "", name) for *_, kind, name in words if kind not in "wv"}


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"wheels: {' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
