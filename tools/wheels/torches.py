"""The files of torch that a build of the operator library needs, unpacked from torch's wheel."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARIES = ("torch/lib/libc10.so", "torch/lib/libtorch_cpu.so")
_OTHERS = ("torch/version.py", *LIBRARIES)
_HEADERS = "torch/include/"
# The wheels of one version of torch for all Pythons have the same headers and libraries.
_PLATFORM = (
    "--platform",
    "manylinux_2_28_x86_64",
    "--python-version",
    "3.12",
    "--only-binary",
    ":all:",
)


def unpack(torch: str, cache: Path) -> Path:
    """The folder `torch` with the headers, libraries and version of one torch.

    Args:
        torch: a version, such as "2.13.0", whose wheel pip downloads, or the path of a wheel.
        cache: the folder that keeps the unpacked files. The downloaded wheel is removed.

    Raises:
        SystemExit: pip cannot download the wheel, or the file is not a wheel of torch.
    """
    if torch.endswith(".whl"):
        return _unpack(Path(torch), cache)
    if not re.fullmatch(r"\d+\.\d+\.\d+", torch):
        raise SystemExit(
            "wheels: --torch must be a version such as 2.13.0, or the path of a wheel, "
            f"got {torch!r}"
        )
    known = sorted(cache.glob(f"torch-{torch}*/torch"))
    if known:
        return known[0]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *_PLATFORM]
        print(f"downloading torch {torch}", flush=True)
        if subprocess.run([*download, "--dest", folder, f"torch=={torch}"]).returncode != 0:
            raise SystemExit(f"wheels: pip could not download torch {torch} (see above)")
        (wheel,) = Path(folder).glob("*.whl")
        return _unpack(wheel, cache)


def _unpack(wheel: Path, cache: Path) -> Path:
    """Unpacks a wheel into a folder named after its version, unless that exists."""
    name = re.match(r"(torch-[^-]+)-.*-(manylinux|linux)\w*x86_64\.whl$", wheel.name)
    if name is None:
        raise SystemExit(f"wheels: expected a wheel of torch for Linux on x86-64, got {wheel}")
    if not wheel.is_file():
        raise SystemExit(f"wheels: {wheel} does not exist")
    target = cache / name[1] / "torch"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="unpack-", dir=cache))
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            missing = [name for name in _OTHERS if name not in names]
            if missing:
                raise SystemExit(f"wheels: {wheel} has no {' and no '.join(missing)}")
            headers = (name for name in names if name.startswith(_HEADERS))
            archive.extractall(partial, [*_OTHERS, *headers])
        target.parent.mkdir(exist_ok=True)
        (partial / "torch").rename(target)
    except (zipfile.BadZipFile, OSError) as error:
        raise SystemExit(f"wheels: {wheel} cannot be unpacked ({error})") from None
    finally:
        shutil.rmtree(partial)
    return target
