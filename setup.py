"""Drives CMake, which owns every source and flag of the native part (CMakeLists.txt).

Environment variables: `CMAKE_ARGS`, as in `CMAKE_ARGS=-DTXL_WERROR=ON pip install .`, adds
options of CMake; `MAX_JOBS` and `CMAKE_BUILD_PARALLEL_LEVEL` limit how many compilers run at a
time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build backends do not put the folder of setup.py there
from build_target import find_target  # noqa: E402

JOB_LIMITS = ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL")
# Messages of compilers, of the shell and of ninja (exit code 137: killed).
OUT_OF_MEMORY = re.compile(
    r"\bKilled\b|[Oo]ut of memory|memory exhausted|Cannot allocate memory|bad_alloc|\[code=137\]"
)


class NativeDistribution(Distribution):
    """Adds config settings: `pip install . -C--global-option=--require-native`."""

    global_options: ClassVar = [
        *Distribution.global_options,
        ("torch-python=", None, "interpreter for whose torch the native part is built"),
        ("require-native", None, "fail where the native part cannot be built"),
        ("no-native", None, "build the wheel for every system, without the native part"),
        ("prebuilt=", None, "folder with _native and _C.*.so, built by CMake, to use unchanged"),
    ]
    torch_python: str | None = None
    require_native: int = 0
    no_native: int = 0
    prebuilt: str | None = None

    def parse_command_line(self) -> bool:
        """Refuses options that contradict each other."""
        result = bool(super().parse_command_line())
        chosen = {
            "--require-native": self.require_native,
            "--no-native": self.no_native,
            "--prebuilt": self.prebuilt,
        }
        given = [name for name, value in chosen.items() if value]
        if len(given) > 1:
            raise SystemExit(f"setup.py: {' and '.join(given)} exclude each other")
        return result

    def has_ext_modules(self) -> bool:
        """False makes a wheel for every system."""
        return not self.no_native and bool(super().has_ext_modules())


class Wheel(bdist_wheel):
    """Tags a wheel with prebuilt libraries for every Python 3: the libraries need none."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if self.distribution.prebuilt else (python, abi, platform)


class PythonBuild(build_py):
    """With --no-native, adds the record of why there is no native part."""

    def run(self) -> None:
        super().run()
        if self.distribution.no_native:
            package = (ROOT if self.editable_mode else Path(self.build_lib)) / "txl_kernels"
            if not self.editable_mode:
                remove_earlier_outputs(package)
            reason = "the wheel for every system has none"
            record = {"built": False, "reason": reason, "interpreter": ""}
            path = package / "_native" / "build.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record) + "\n", encoding="utf-8")


class CMakeBuild(build_ext):
    """Builds the operator library and `_C`, or in their place a record that says why not.

    The library is built for one torch. In place, those for other versions of torch remain.
    """

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        output = ROOT if in_place else Path(self.build_lib).resolve()
        if not in_place:
            remove_earlier_outputs(output / "txl_kernels")
        if self.distribution.prebuilt is not None:
            copy_prebuilt(self.distribution.prebuilt, output / "txl_kernels")
            return
        # One folder per Python, so that a second build from the same checkout is incremental.
        binary_dir = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        cmake, ninja = tool("cmake"), tool("ninja")
        target = find_target(self.distribution.torch_python)
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(binary_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_dir()}",
            f"-DTXL_TORCH_DIR={target.torch_dir}",
            f"-DTXL_TORCH_PYTHON={target.interpreter}",
            f"-DTXL_OUTPUT_DIR={output / 'txl_kernels'}",
            f"-DTXL_STRIP={'OFF' if in_place else 'ON'}",
            f"-DTXL_REQUIRE_NATIVE={'ON' if self.distribution.require_native else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        compile_all = [cmake, "--build", str(binary_dir), *job_limit()]
        forget_configuration(binary_dir)
        if subprocess.run(configure).returncode != 0:
            raise SystemExit("setup.py: CMake could not configure the native part (see above)")
        build(compile_all)


def remove_earlier_outputs(package: Path) -> None:
    """Removes native files from a folder of setuptools, which keeps those of earlier builds."""
    shutil.rmtree(package / "_native", ignore_errors=True)
    for path in (*package.glob("_C.*"), package / "_native_build.json"):
        path.unlink(missing_ok=True)


def copy_prebuilt(folder: str, package: Path) -> None:
    """Copies libraries with their records, and the modules `_C`, from a folder that CMake filled.

    Raises:
        SystemExit: `folder` is not an absolute path, has no library, or has one without its record
            or built from other sources.
    """
    source = Path(folder)
    if not source.is_absolute():
        raise SystemExit(f"setup.py: --prebuilt must be an absolute path, got {folder!r}")
    libraries = sorted(source.glob("_native/torch-*/libtxl_kernels.so"))
    if not libraries:
        raise SystemExit(f"setup.py: --prebuilt={folder} has no _native/torch-*/libtxl_kernels.so")
    for library in libraries:
        check_prebuilt(library)
    for library in libraries:
        target = package / "_native" / library.parent.name
        target.mkdir(parents=True, exist_ok=True)
        for path in (library, library.with_name("build.json")):
            shutil.copy2(path, target)
    for path in sorted(source.glob("_C.*.so")):
        shutil.copy2(path, package)


def check_prebuilt(library: Path) -> None:
    """Stops the build unless the record of a library fits the sources of this package."""
    record = library.with_name("build.json")
    try:
        interface = json.loads(record.read_text(encoding="utf-8"))["interface"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"setup.py: {record} is no build record ({error!r})") from None
    for name, actual in interface.items():
        expected = hashlib.sha256((ROOT / "txl_kernels" / name).read_bytes()).hexdigest()
        if actual != expected:
            raise SystemExit(
                f"setup.py: {library} was built from other sources: the hash of {name} must be "
                f"{expected}, got {actual}"
            )


def tool(name: str) -> str:
    """Path of a build tool: this interpreter's own if it has one, else the first on PATH."""
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(places))
    return found or missing(name)


def pybind11_dir() -> str:
    """The folder of pybind11's CMake files."""
    if importlib.util.find_spec("pybind11") is None:
        missing("pybind11")
    import pybind11

    return str(pybind11.get_cmake_dir())


def missing(requirement: str) -> str:
    """Stops the build with one sentence."""
    raise SystemExit(
        f"setup.py: {requirement} was not found: install the packages of pyproject.toml's "
        "build-system first, or leave out --no-build-isolation"
    )


def job_limit() -> list[str]:
    """CMake's option for the smaller of the limits in the environment, if one is set."""
    limits = {name: os.environ[name].strip() for name in JOB_LIMITS if os.environ.get(name)}
    for name, limit in limits.items():
        if not limit.isdecimal() or int(limit) == 0:
            raise SystemExit(f"setup.py: {name} must be a positive integer, got {limit!r}")
    return ["--parallel", str(min(map(int, limits.values())))] if limits else []


def forget_configuration(binary_dir: Path) -> None:
    """Removes an earlier configuration: its options, compiler and paths may no longer hold.

    Object files stay: ninja compiles those again whose command has changed.
    """
    (binary_dir / "CMakeCache.txt").unlink(missing_ok=True)
    for description in (binary_dir / "CMakeFiles").glob("*/CMakeSystem.cmake"):
        shutil.rmtree(description.parent)


def build(command: list[str]) -> None:
    """Runs `cmake --build`, and names the limits of jobs if a compiler lacked memory."""
    out_of_memory = False
    with subprocess.Popen(
        command,
        env={**os.environ, "LC_ALL": "C"},  # compilers' messages in English
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            out_of_memory = out_of_memory or OUT_OF_MEMORY.search(line) is not None
    if process.returncode == 0:
        return
    if out_of_memory or process.returncode in (-9, 137):
        raise SystemExit(
            "setup.py: a compiler was killed or lacked memory; set MAX_JOBS=1 (or "
            "CMAKE_BUILD_PARALLEL_LEVEL=1) to run one compiler at a time"
        )
    raise SystemExit("setup.py: the native part could not be compiled (see above)")


setup(
    distclass=NativeDistribution,
    ext_modules=[Extension("txl_kernels._C", sources=[], optional=True)],
    cmdclass={"bdist_wheel": Wheel, "build_ext": CMakeBuild, "build_py": PythonBuild},
)
