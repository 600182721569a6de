"""The files that users install, made from the files that git tracks: the sdist and both wheels.

The same sources, tools and compiled files give the same bytes, in any folder and at any time: each
file has the time `SOURCE_DATE_EPOCH`, and its permissions do not depend on the user's.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PLATFORM = "manylinux_2_28_x86_64"
# Libraries that are not copied into the wheel: they are torch's, which loads them first.
OF_TORCH = ("libtorch_cpu.so", "libc10.so")
_BUILD = """
import sys
from setuptools import build_meta
kind, output, *options = sys.argv[1:]
settings = {"--global-option": options}
print(getattr(build_meta, f"build_{kind}")(output, config_settings=settings))
"""


def build_sdist(root: Path, output: Path, epoch: int) -> Path:
    """The sdist of the files that git tracks in `root`, as they are in the work tree."""
    listing = ["git", "-C", str(root), "ls-files", "-z"]
    tracked = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, tracked.split("\0")):
            if (root / name).is_file():
                copy = Path(folder, "sources", name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, copy)
        built = _setuptools("sdist", Path(folder, "sources"), Path(folder), epoch)
        return _normalised(built, output / built.name, epoch)


def build_pure_wheel(sdist: Path, output: Path, epoch: int) -> Path:
    """The wheel for every system, without compiled files."""
    return _build_wheel(sdist, output, epoch, "--no-native")


def build_native_wheel(sdist: Path, prebuilt: Path, output: Path, epoch: int) -> Path:
    """The wheel for Linux, with the compiled files in `prebuilt`; auditwheel gives it its tag.

    Raises:
        SystemExit: auditwheel refuses the tag, for instance because a symbol is too new.
    """
    for path in prebuilt.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)
    with tempfile.TemporaryDirectory() as folder:
        wheel = _build_wheel(sdist, Path(folder), epoch, f"--prebuilt={prebuilt}")
        excluded = [argument for name in OF_TORCH for argument in ("--exclude", name)]
        repair = [
            *(sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat"),
            *("--patcher", "none", *excluded, "--wheel-dir", str(output), str(wheel)),
        ]
        done = subprocess.run(
            repair, env=_environment(epoch), umask=0o022, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"wheels: auditwheel refuses {PLATFORM}:\n{done.stdout}{done.stderr}")
        name = wheel.name.replace("linux_x86_64", PLATFORM)
    return output / name


def _build_wheel(sdist: Path, output: Path, epoch: int, *options: str) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(sdist, folder, filter="data")
        (sources,) = Path(folder).iterdir()
        return _setuptools("wheel", sources, output, epoch, *options)


def _setuptools(kind: str, sources: Path, output: Path, epoch: int, *options: str) -> Path:
    """Calls the build backend as an installer does; returns the path of the file."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, kind, str(output), *options],
        cwd=sources,
        env=_environment(epoch),
        umask=0o022,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(
            f"wheels: setuptools could not build the {kind}:\n{done.stdout}{done.stderr}"
        )
    return output / done.stdout.splitlines()[-1]


def _environment(epoch: int) -> dict[str, str]:
    return {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}


def _normalised(sdist: Path, target: Path, epoch: int) -> Path:
    """Writes an sdist again, sorted, with a fixed time and owner instead of the current ones."""
    with (
        tarfile.open(sdist) as source,
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=epoch, fileobj=raw) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as copy,
    ):
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            copy.addfile(member, source.extractfile(member) if member.isfile() else None)
    return target
