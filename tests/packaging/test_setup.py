"""setup.py: limits of parallel jobs, messages of failed builds, no reused configuration."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

setuptools = pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module that sets nothing up."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("txl_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("env", "options"),
    [
        ({}, []),
        ({"MAX_JOBS": ""}, []),
        ({"MAX_JOBS": "3"}, ["--parallel", "3"]),
        ({"CMAKE_BUILD_PARALLEL_LEVEL": "2"}, ["--parallel", "2"]),
        ({"MAX_JOBS": "1", "CMAKE_BUILD_PARALLEL_LEVEL": "8"}, ["--parallel", "1"]),
        ({"MAX_JOBS": "8", "CMAKE_BUILD_PARALLEL_LEVEL": "4"}, ["--parallel", "4"]),
    ],
)
def test_both_limits_of_jobs_hold(script, monkeypatch, env, options):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert script.job_limit() == options


@pytest.mark.parametrize("name", ["MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_limit_that_is_no_positive_integer_is_named(script, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name} must be a positive integer, got '{value}'"):
        script.job_limit()


@pytest.mark.parametrize(
    "shell",
    [
        "echo 'g++: fatal error: Killed signal terminated program cc1plus'; exit 1",
        "echo 'FAILED: [code=137] CMakeFiles/_C.dir/module.cpp.o'; exit 1",
        "echo 'virtual memory exhausted: Cannot allocate memory' >&2; exit 1",
        "echo 'cc1plus: out of memory allocating 65536 bytes'; exit 1",
        "kill -KILL $$",
        "exit 137",
    ],
)
def test_a_compiler_without_memory_is_one_sentence_that_names_the_limits(script, capfd, shell):
    with pytest.raises(SystemExit) as error:
        script.build(["/bin/sh", "-c", shell])
    message = str(error.value)
    assert "MAX_JOBS=1" in message
    assert "CMAKE_BUILD_PARALLEL_LEVEL=1" in message
    assert "\n" not in message
    assert capfd.readouterr().out.strip() in shell.replace("'", "")


def test_another_failure_of_a_compiler_does_not_blame_memory(script, capfd):
    with pytest.raises(SystemExit, match="could not be compiled") as error:
        script.build(["/bin/sh", "-c", "echo 'rel_shift.cpp:3: error: x'; exit 1"])
    assert "MAX_JOBS" not in str(error.value)
    assert "rel_shift.cpp:3: error: x" in capfd.readouterr().out


def test_compilers_report_in_english(script, monkeypatch, capfd):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    script.build(["/bin/sh", "-c", "echo $LC_ALL"])
    assert capfd.readouterr().out == "C\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--prebuilt=\S+ has no _native/torch-\*/libtxl_kernels.so$"),
        ("", r"build.json is no build record \(JSONDecodeError"),
        ("[]", r"build.json is no build record \(TypeError"),
        ("{}", r"build.json is no build record \(KeyError\('interface'\)"),
        (
            '{"interface": {"_schemas.py": "01"}}',
            r"was built from other sources: the hash of _schemas.py must be \w{64}, got 01$",
        ),
    ],
)
def test_prebuilt_libraries_are_checked_before_any_is_copied(script, tmp_path, content, message):
    target = tmp_path / "package"
    if content is not None:
        library = tmp_path / "_native" / "torch-2.13" / "libtxl_kernels.so"
        library.parent.mkdir(parents=True)
        library.touch()
        library.with_name("build.json").write_text(content)
    with pytest.raises(SystemExit, match=message) as error:
        script.copy_prebuilt(str(tmp_path), target)
    assert "\n" not in str(error.value)
    assert not target.exists()


def test_the_folder_of_prebuilt_libraries_is_an_absolute_path(script, tmp_path):
    with pytest.raises(SystemExit, match="--prebuilt must be an absolute path, got 'here'"):
        script.copy_prebuilt("here", tmp_path)


def test_options_that_exclude_each_other_are_named(script):
    options = {
        "script_name": "setup.py",
        "script_args": ["--no-native", "--require-native", "build"],
    }
    distribution = script.NativeDistribution(options)
    with pytest.raises(SystemExit, match="--require-native and --no-native exclude each other"):
        distribution.parse_command_line()


def test_a_missing_requirement_is_one_sentence(script, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pybind11" else find_spec(name)
    )
    with pytest.raises(SystemExit, match=r"pybind11 was not found.*--no-build-isolation"):
        script.pybind11_dir()
    monkeypatch.setattr(script.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match=r"ninja was not found.*--no-build-isolation"):
        script.tool("ninja")


def test_a_configuration_is_forgotten_and_its_objects_are_kept(script, tmp_path):
    compiler = tmp_path / "CMakeFiles" / "3.31.2"
    objects = tmp_path / "CMakeFiles" / "_C.dir"
    for folder in (compiler, objects):
        folder.mkdir(parents=True)
    for file in ("CMakeSystem.cmake", "CMakeCXXCompiler.cmake"):
        (compiler / file).touch()
    (objects / "module.cpp.o").touch()
    (tmp_path / "CMakeCache.txt").touch()
    script.forget_configuration(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"CMakeFiles/_C.dir/module.cpp.o"}
    script.forget_configuration(tmp_path / "a folder that does not exist")
