"""Builds and installs on machines that lack something: they succeed and record the reason."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RECORD = Path("txl_kernels") / "_native" / "build.json"
ASK = "from txl_kernels.backends import native; print(native.unavailable_reason())"
OPTIONS = "--force-reinstall --no-deps --no-cache-dir"

pytestmark = pytest.mark.slow_build
for module in ("pybind11", "setuptools"):
    pytest.importorskip(module)


def install(sources: Path, target: Path, *options: str, **env: str) -> dict:
    """Installs into the folder `target` and returns the build record there."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    plain = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    subprocess.run(
        [*pip, "--no-build-isolation", "--no-deps", "--target", target, *options, sources],
        env={**plain, **env},
        check=True,
    )
    return json.loads((target / RECORD).read_text(encoding="utf-8"))


def test_install_without_a_compiler_succeeds_and_says_so(sources, tmp_path, path_without_compiler):
    record = install(sources, tmp_path / "site", PATH=path_without_compiler)
    assert not record["built"]
    assert "no C++ compiler" in record["reason"]

    answer = subprocess.run(
        [sys.executable, "-S", "-c", ASK],
        env={"PYTHONPATH": f"{tmp_path / 'site'}:{':'.join(sys.path)}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no C++ compiler" in answer.stdout


def build_wheel(sources: Path, *options: str) -> Path:
    """Builds a wheel and returns the folder with its files, which has the wheel's name."""
    command = [sys.executable, "setup.py", *options, "bdist_wheel"]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    folder = sources.parent / wheel.stem
    shutil.unpack_archive(wheel, folder, "zip")
    return folder


def test_the_wheel_for_every_system_says_how_to_build(sources):
    stale = sources / "build" / "lib" / "txl_kernels" / "_native" / "torch-2.13"
    stale.mkdir(parents=True)
    (stale / "libtxl_kernels.so").touch()
    folder = build_wheel(sources, "--no-native")
    assert folder.name.endswith("-py3-none-any")
    files = {path.name for path in (folder / "txl_kernels").rglob("*") if path.suffix != ".py"}
    assert {"_native", "build.json"} <= files
    assert not {name for name in files if name.startswith("torch-") or name.endswith(".so")}
    answer = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=sources.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    version = folder.name.split("-")[1]
    assert "without its native part: the wheel for every system has none" in answer.stdout
    assert f"--no-binary transformer-xl transformer-xl=={version}" in answer.stdout


def test_a_wheel_of_prebuilt_libraries_is_for_every_python(sources, tmp_path):
    staging = tmp_path / "built before"
    for minor in ("2.11", "2.13"):
        library = staging / "_native" / f"torch-{minor}" / "libtxl_kernels.so"
        library.parent.mkdir(parents=True)
        library.write_text(minor)
        schemas = hashlib.sha256((sources / "txl_kernels" / "_schemas.py").read_bytes())
        record = {"built": True, "interface": {"_schemas.py": schemas.hexdigest()}}
        library.with_name("build.json").write_text(json.dumps(record))
    modules = ["_C.cpython-310-x86_64-linux-gnu.so", "_C.cpython-313-x86_64-linux-gnu.so"]
    for name in modules:
        (staging / name).touch()
    folder = build_wheel(sources, f"--prebuilt={staging}")
    assert "-py3-none-linux_" in folder.name
    package = folder / "txl_kernels"
    for minor in ("2.11", "2.13"):
        assert (package / "_native" / f"torch-{minor}" / "libtxl_kernels.so").read_text() == minor
    assert sorted(path.name for path in package.glob("_C.*")) == modules


def test_a_build_without_torch_succeeds_and_says_so(setup_build):
    search = "import importlib.util as u; raise SystemExit(u.find_spec('torch') is not None)"
    if subprocess.run([f"{sys.base_prefix}/bin/python3", "-c", search]).returncode != 0:
        pytest.skip("the Python that this environment is made from has torch itself")
    done, record = setup_build()
    assert done.returncode == 0, done.stderr
    assert "torch was not found" in record["reason"]
    assert OPTIONS not in record["reason"]  # the command that Python adds has them
    assert OPTIONS in " ".join(done.stderr.split())
    assert record["interpreter"] == ""


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "PATH"])
def test_the_record_names_the_interpreter_that_has_the_torch(
    setup_build, fake_environment, path_without_python, variable
):
    on_path = {"path": f"{path_without_python}:{fake_environment}/bin"}
    done, record = setup_build(
        **on_path if variable == "PATH" else {variable: str(fake_environment)}
    )
    assert done.returncode == 0, done.stderr
    assert "the build found 2.0.1" in record["reason"]
    assert record["interpreter"] == f"{fake_environment}/bin/python"


@pytest.mark.parametrize("path", ["/usr/bin/python3", '/a@b@c/${HOME}/my "env"\\1/python'])
def test_the_record_is_json_whatever_the_interpreter_s_path(configure, tmp_path, path):
    run = configure(f"-DTXL_TORCH_PYTHON={path}")
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "build" / RECORD.name).read_text(encoding="utf-8"))
    assert record["built"]
    assert record["interpreter"] == path
    configure(f"-DTXL_TORCH_PYTHON={path}", version="2.0.0")
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert not record["built"]
    assert record["interpreter"] == path


def test_require_native_fails_with_the_reason_instead(setup_build, fake_environment):
    options = ("--require-native", f"--torch-python={fake_environment}/bin/python")
    done, record = setup_build(*options)
    assert done.returncode != 0
    assert record is None
    assert "--require-native: it needs torch 2.11" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_wrong_torch_python_fails_and_names_the_option(setup_build):
    done, record = setup_build("--torch-python=/nonexistent/python")
    assert done.returncode != 0
    assert record is None
    assert done.stderr.strip() == "setup.py: --torch-python=/nonexistent/python does not exist"


def test_a_build_without_pybind11_fails_with_one_sentence(setup_build, build_python):
    (package,) = Path(build_python).parents[1].glob("lib/*/site-packages/pybind11")
    package.unlink()
    done, _ = setup_build()
    assert done.returncode != 0
    (message,) = done.stderr.strip().splitlines()
    assert message.startswith("setup.py: pybind11 was not found")


def test_a_killed_compiler_fails_with_one_sentence_that_names_the_limits(
    setup_build, fake_environment, tool, tmp_path
):
    (version,) = fake_environment.glob("lib/*/site-packages/torch/version.py")
    version.write_text("__version__ = '2.13.0'\ncuda = None\n")
    (version.parent / "lib").mkdir()
    for name in ("libc10.so", "libtorch_cpu.so"):
        (version.parent / "lib" / name).touch()
    compiler = tmp_path / "g++"
    compiler.write_text(f"""#!/bin/sh
case "$*" in *csrc*) echo 'g++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1
esac
exec {tool("g++")} "$@"
""")
    compiler.chmod(0o755)
    done, _ = setup_build(CXX=str(compiler), VIRTUAL_ENV=str(fake_environment))
    assert done.returncode != 0
    assert "Killed signal" in done.stdout
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("setup.py: a compiler was killed")
    assert "MAX_JOBS" in message
    assert "CMAKE_BUILD_PARALLEL_LEVEL" in message
    assert "Traceback" not in done.stderr


def test_a_compiler_that_does_not_exist_is_named(setup_build):
    done, record = setup_build(CXX="/nonexistent/g++ -pipe")
    assert done.returncode == 0, done.stderr
    assert "CXX names does not exist: /nonexistent/g++ -pipe" in record["reason"]
    assert "install g++" not in record["reason"]


@pytest.mark.parametrize("flags", ["-mno-such-flag", "-DPATH='\\\"a b\\\"'  -mno-such-flag"])
def test_a_compiler_that_fails_is_named_with_its_flags(configure, tmp_path, flags):
    run = configure(CXXFLAGS=flags)
    assert run.returncode == 0, run.stderr
    reason = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))["reason"]
    assert f'does not build a test program (CXXFLAGS="{flags}"' in reason


@pytest.mark.parametrize("option", ["OFF", "AUTO"])
def test_without_a_cuda_torch_there_are_no_cuda_kernels_and_the_reason_is_said(configure, option):
    run = configure(f"-DTXL_CUDA={option}")
    assert run.returncode == 0, run.stderr
    reason = {"OFF": "TXL_CUDA=OFF", "AUTO": "torch 2.13.0 is built without CUDA"}[option]
    assert f"No CUDA kernels: {'the build was told ' * (option == 'OFF')}{reason}" in run.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"option": "ON"}, "TXL_CUDA=ON: torch 2.13.0 is built without CUDA"),
        ({"option": "ON", "version": "2.10.0"}, "TXL_CUDA=ON: it needs torch 2.11"),
        ({"option": "ON", "cuda": "11.8"}, "torch of 11.8"),
        ({"option": "yes"}, "TXL_CUDA must be AUTO, ON, OFF or COMPILE_ONLY, got yes"),
    ],
    ids=["no_cuda_torch", "old_torch", "another_cuda", "unknown"],
)
def test_cuda_on_without_its_requirements_fails_loudly(configure, tool, options, named):
    if "cuda" in options:
        tool("nvcc")
    run = configure(f"-DTXL_CUDA={options.pop('option')}", **options)
    assert run.returncode != 0
    assert named in " ".join(run.stderr.split())


@pytest.mark.parametrize(("cuda", "built"), [("13.0", True), ("11.8", False)])
def test_auto_depends_on_the_toolchain_alone(configure, tool, cuda, built):
    """No GPU is needed."""
    version = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True).stdout
    if built and "release 13." not in version:
        pytest.skip("needs nvcc of CUDA 13")
    run = configure(cuda=cuda)
    assert run.returncode == 0, run.stderr
    assert ("No CUDA kernels" not in run.stdout) == built


def test_a_failed_attempt_leaves_the_libraries_for_other_torches(configure, tmp_path):
    libraries = [
        tmp_path / "txl_kernels" / "_native" / f"torch-{minor}" / "libtxl_kernels.so"
        for minor in ("2.10", "2.13")
    ]
    for library in libraries:
        library.parent.mkdir(parents=True)
        library.touch()
    configure(version="2.10.1")
    assert [library.exists() for library in libraries] == [False, True]


def test_a_damaged_library_is_linked_again(configure, tmp_path):
    """ninja compares times: it would leave the file as it is."""
    folder = tmp_path / "txl_kernels" / "_native" / "torch-2.13"
    folder.mkdir(parents=True)
    for name in ("libtxl_kernels.so", "build.json"):
        (folder / name).touch()
    configure()
    assert list(folder.iterdir()) == []


def test_files_of_an_earlier_version_are_removed(configure, tmp_path):
    """There `_C` contained the kernels; a new one for another Python stays."""
    package = tmp_path / "txl_kernels"
    package.mkdir()
    module, record = package / "_C.cpython-310-x86_64-linux-gnu.so", package / "_native_build.json"
    module.touch()
    configure()
    assert module.exists()
    record.touch()
    configure()
    assert not module.exists()
    assert not record.exists()


@pytest.mark.parametrize(
    ("processor", "sets"),
    [("x86_64", ["DEFAULT", "AVX2", "AVX512", "AVX512BF16"]), ("aarch64", ["DEFAULT"])],
)
def test_instruction_sets_are_those_of_the_target_s_processor(configure, tmp_path, processor, sets):
    target = (f"-DCMAKE_SYSTEM_PROCESSOR={processor}", "-DCMAKE_SYSTEM_NAME=Linux")
    run = configure(*target, "-DTXL_PYTHON_MODULE=OFF")
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "build" / RECORD.name).read_text(encoding="utf-8"))
    assert record["processor"] == processor
    assert record["instruction_sets"] == sets


def test_another_processor_is_a_reason(configure, tmp_path):
    configure("-DCMAKE_SYSTEM_PROCESSOR=riscv64", "-DCMAKE_SYSTEM_NAME=Linux")
    reason = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))["reason"]
    assert reason == "it is made for Linux on x86_64 and aarch64, this is Linux on riscv64"


def test_without_python_s_headers_the_kernels_are_built_alone(configure, tmp_path):
    run = configure("-DPython_INCLUDE_DIR=/nonexistent")
    assert run.returncode == 0, run.stderr
    assert "kernels are built without txl_kernels._C" in " ".join(run.stderr.split())
    entries = json.loads((tmp_path / "build" / "compile_commands.json").read_text("utf-8"))
    files = {Path(entry["file"]).name for entry in entries}
    assert "build_record.cpp" in files
    assert "module.cpp" not in files


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117"])
def test_a_torch_too_old_is_a_reason(configure, tmp_path, version):
    run = configure(version=version)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert not record["built"]
    assert version in record["reason"]
