"""The ways to install: each is a function that runs its commands in a fresh environment."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from tools.installs.environments import Interpreter, create, run

ROOT = Path(__file__).resolve().parents[2]
SMOKE_TEST = ROOT / "tests" / "packaging" / "smoke.py"
# The environments have torch, perhaps not all packages that it requires: none is downloaded.
PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps")
# The builds show that an installation works, not how fast the kernels are.
FLAGS = {
    "CXXFLAGS": "-O0 -DNDEBUG",
    "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=None -DTXL_CUDA=OFF",
    "MAX_JOBS": "1",
}
_BUILD_TOOLS = ("setuptools>=77", "cmake", "ninja", "pybind11")
# Programs that CMake and pip start, besides compilers.
_PROGRAMS = ("env", "sh", "uname")


class Sources(NamedTuple):
    """What is installed, and the tools that install it."""

    sdist: Path
    pure_wheel: Path
    tools: Path  # an interpreter with uv and build


class Place(NamedTuple):
    """A fresh environment, and a folder for other files."""

    folder: Path
    python: Path
    env: Mapping[str, str]
    log: IO[str]

    def pip(self, *arguments: str | Path, **env: str) -> None:
        """`pip install` in the environment."""
        run((self.python, *PIP, *arguments), self.log, cwd=self.folder, env={**self.env, **env})


class Way(NamedTuple):
    """A way to install; `install` returns the folder that the packages are imported from."""

    name: str
    text: str
    install: Callable[[Place, Sources], Path]
    is_native: bool = True


def prepare(out: Path, base: Interpreter, log: IO[str]) -> Sources:
    """Makes the sdist, the wheel for every system, and an environment with uv and build."""
    tools = create(out / "tools", base, log)
    place = Place(out, tools, environment(tools), log)
    run((tools, *PIP[:-1], "build", "uv"), log, env=place.env)
    dist = out / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    build = (tools, "-m", "build", "--outdir", dist)
    run((*build, "--sdist", ROOT), log, cwd=out, env=place.env)
    (sdist,) = dist.glob("*.tar.gz")
    pure = (*build, "--wheel", "-C--global-option=--no-native", unpack(sdist, out / "pure"))
    run(pure, log, cwd=out, env=place.env)
    (wheel,) = dist.glob("*-py3-none-any.whl")
    return Sources(sdist, wheel, tools)


def environment(python: Path, **more: str) -> dict[str, str]:
    """The variables of an activated environment, with the flags of the builds."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "CONDA_PREFIX")
    plain = {name: value for name, value in os.environ.items() if name not in hidden}
    path = os.pathsep.join([str(python.parent), plain.get("PATH", os.defpath)])
    return {**FLAGS, **plain, "PATH": path, "VIRTUAL_ENV": str(python.parents[1]), **more}


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpacks the sdist; returns the folder of the sources."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.unpack_archive(sdist, folder)
    return next(folder.iterdir())


def wheel_way(wheel: Path) -> Way:
    """`pip install` of a wheel with native libraries."""

    def install(place: Place, sources: Sources) -> Path:
        place.pip("--no-index", wheel)
        return place.python.parents[1]

    return Way("wheel", f"pip install {wheel.name}", install)


def _pip(place: Place, sources: Sources) -> Path:
    place.pip(unpack(sources.sdist, place.folder / "sources"))
    return place.python.parents[1]


def _uv(place: Place, sources: Sources) -> Path:
    source = unpack(sources.sdist, place.folder / "sources")
    uv = sources.tools.parent / "uv"
    command = (uv, "pip", "install", "--no-cache", "--no-deps", source)
    run(command, place.log, cwd=place.folder, env=place.env)
    return place.python.parents[1]


def _build(place: Place, sources: Sources) -> Path:
    source = unpack(sources.sdist, place.folder / "sources")
    dist = place.folder / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    command = (sources.tools, "-m", "build", "--outdir", dist, "--wheel", source)
    run(command, place.log, cwd=place.folder, env=place.env)
    place.pip("--no-index", *dist.glob("*.whl"))
    return place.python.parents[1]


def _editable(place: Place, sources: Sources) -> Path:
    source = unpack(sources.sdist, place.folder / "sources")
    place.pip("-e", source)
    return source


def _offline(place: Place, sources: Sources) -> Path:
    place.pip(*_BUILD_TOOLS)
    command = (place.python, *PIP, "--no-build-isolation", "--no-cache-dir", sources.sdist)
    env = {**place.env, "PIP_NO_INDEX": "1"}
    run((*without_network(), *command), place.log, cwd=place.folder, env=env)
    return place.python.parents[1]


def _pure(place: Place, sources: Sources) -> Path:
    place.pip("--no-index", sources.pure_wheel, PATH=without_compiler(place.folder))
    return place.python.parents[1]


def _no_compiler(place: Place, sources: Sources) -> Path:
    place.pip("--no-cache-dir", sources.sdist, PATH=without_compiler(place.folder))
    return place.python.parents[1]


def _path(place: Place, sources: Sources) -> Path:
    place.pip(unpack(sources.sdist, place.folder / "Quellen mit Leerzeichen und Ümläuten"))
    return place.python.parents[1]


@functools.cache
def without_network() -> tuple[str, ...]:
    """The beginning of a command that sees no network, where this system allows one."""
    prefix = ("unshare", "--map-root-user", "--net")
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True)
    except OSError:
        return ()
    return prefix if done.returncode == 0 else ()


def without_compiler(folder: Path) -> str:
    """A PATH without compilers."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in _PROGRAMS:
        found = shutil.which(name)
        if found is not None and not (programs / name).exists():
            (programs / name).symlink_to(found)
    return str(programs)


WAYS = (
    Way("pip", "pip install .", _pip),
    Way("uv", "uv pip install .", _uv),
    Way("build", "python -m build; pip install the wheel", _build),
    Way("editable", "pip install -e .", _editable),
    Way("offline", "pip install the sdist, without network", _offline),
    Way("pure", "pip install the wheel for every system, no compiler", _pure, is_native=False),
    Way("no-compiler", "pip install the sdist, no compiler", _no_compiler, is_native=False),
    Way("path", "pip install from a path with spaces and umlauts", _path),
)
