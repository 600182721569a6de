"""`native.unavailable_reason` for every kind of build record, none of which may be loaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from txl_kernels._schemas import SCHEMAS
from txl_kernels.backends import native
from txl_kernels.backends import native_installation as installation

CMAKE_LISTS = Path(__file__).resolve().parents[2] / "CMakeLists.txt"
RECORD = {"built": True, "torch": torch.__version__, "interface": {}}
LOAD = native.load
MINOR = installation._minor(torch.__version__)


def add(folder: Path, record: dict | str, minor: str | None = None, library: str = "") -> None:
    """Writes a record, and a file in place of the library if the record is of one."""
    folder = folder / installation.FOLDER / (f"torch-{minor}" if minor else "")
    folder.mkdir(parents=True, exist_ok=True)
    text = record if isinstance(record, str) else json.dumps(record)
    (folder / installation.RECORD_NAME).write_text(text, encoding="utf-8")
    if minor:
        (folder / installation.LIBRARY_NAME).write_text(library)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder in which nothing may be loaded."""
    monkeypatch.setattr(installation, "PACKAGE_DIR", tmp_path)
    monkeypatch.setattr(installation, "build_command", lambda: "build it")
    load = "loaded before the record was checked"
    monkeypatch.setattr(native, "load", lambda: pytest.fail(load))
    return tmp_path


@pytest.fixture
def reason(package: Path) -> Callable[[], str]:
    def ask() -> str:
        answer = native.unavailable_reason.__wrapped__()
        assert answer is not None
        return answer

    return ask


@pytest.fixture
def problem(reason: Callable[[], str]) -> Callable[[], str]:
    """Returns the reason without the command, which must be at its end."""

    def ask() -> str:
        text, command = reason().split("; this command builds the kernels: ")
        assert command == "build it"
        assert "\n" not in text
        return text

    return ask


def test_a_library_for_another_torch_is_not_loaded(package, problem):
    add(package, {**RECORD, "torch": "2.1.0", "interpreter": "/a/bin/python"}, "2.1")
    assert problem() == (
        "the native library of txl_kernels was built for torch 2.1.0 of /a/bin/python, "
        f"but torch {torch.__version__} is installed here"
    )


@pytest.mark.parametrize("damaged", [None, "{", "[]"])
def test_a_library_for_another_torch_is_named_without_its_record(package, problem, damaged):
    add(package, damaged or "", "2.1")
    if damaged is None:
        (package / installation.FOLDER / "torch-2.1" / installation.RECORD_NAME).unlink()
    assert "built for torch 2.1, but" in problem()


def test_all_versions_of_a_wheel_are_named_in_order(package, problem):
    for minor in ("2.11", "2.9", "2.12"):
        add(package, {**RECORD, "torch": f"{minor}.0"}, minor)
    (package / installation.FOLDER / "torch-2.1").mkdir()  # without a library
    assert "has native libraries for torch 2.9, 2.11 and 2.12, but" in problem()


def test_a_library_whose_record_is_of_another_torch_is_not_loaded(package, problem):
    add(package, {**RECORD, "torch": "2.1.0"}, MINOR)
    assert "built for torch 2.1.0 in" in problem()


def test_a_library_for_other_schemas_is_not_loaded(package, problem):
    (package / "_schemas.py").write_text("newer")
    same = hashlib.sha256(b"newer").hexdigest()
    add(package, {**RECORD, "interface": {"_schemas.py": "0" * 64, "not installed.py": "0"}}, MINOR)
    text = problem()
    assert "was built from other sources than those of txl_kernels here" in text
    assert text.endswith("(changed: _schemas.py)")
    (package / "_other.py").touch()
    interface = {"_schemas.py": same, "_other.py": "0"}
    add(package, {**RECORD, "interface": interface}, MINOR)
    assert problem().endswith("(changed: _other.py)")


def test_every_schema_is_in_a_file_whose_hash_is_recorded():
    """Else a library for other schemas could be loaded, which would end the process."""
    listed = re.search(r"set\(TXL_INTERFACE_FILES ([^)]+)\)", CMAKE_LISTS.read_text("utf-8"))
    assert "_schemas.py" in listed.group(1).split()
    registered = {schema.name for schema in torch._C._jit_get_all_schemas()}
    in_python = {name for name in registered if name.startswith("txl_native::")} - {
        "txl_native::gemm_unavailable_reason",
        "txl_native::probe_gemm",
    }
    assert in_python == {f"txl_native::{name}" for name in SCHEMAS}


def test_processors_are_those_of_the_build():
    listed = re.search(r"set\(TXL_PROCESSORS ([^)]+)\)", CMAKE_LISTS.read_text("utf-8"))
    assert tuple(listed.group(1).split()) == installation.PROCESSORS


def test_the_reason_that_the_build_recorded_is_given(package, problem):
    add(package, {"built": False, "reason": "no C++ compiler was found"})
    assert problem().endswith("was installed without its native part: no C++ compiler was found")


def test_a_library_is_used_whatever_an_attempt_for_another_torch_recorded(package, monkeypatch):
    add(package, {"built": False, "reason": "no C++ compiler was found"})
    add(package, RECORD, MINOR)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "_products_refusal", lambda: None)
    assert native.unavailable_reason.__wrapped__() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"built": true}'])
@pytest.mark.parametrize("minor", [None, MINOR], ids=["no_library", "library"])
def test_a_damaged_record_is_a_reason(package, problem, text, minor):
    add(package, text, minor)
    assert "unreadable" in problem()
    assert str(package) in problem()


def test_a_library_without_its_record_is_not_loaded(package, problem):
    add(package, RECORD, MINOR)
    path = native.library_path().with_name(installation.RECORD_NAME)
    path.unlink()
    assert f"the build record {path} is unreadable (FileNotFoundError" in problem()


def test_a_build_by_an_earlier_version_is_not_loaded(package, problem):
    (package / installation.EARLIER_RECORD_NAME).write_text('{"built": true}')
    assert "was built by an earlier version of txl_kernels" in problem()


def test_a_folder_without_a_build_is_named(package, problem, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: [])
    assert str(package) in problem()
    assert "never built" in problem()


def test_a_checkout_in_front_of_an_installed_build_is_named(
    package, problem, tmp_path_factory, monkeypatch
):
    site = tmp_path_factory.mktemp("site-packages")
    (site / "txl_kernels" / installation.FOLDER).mkdir(parents=True)
    info = site / "transformer_xl-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: transformer-xl\nVersion: 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    assert str(package) in problem()
    assert str(site / "txl_kernels") in problem()


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "riscv64")])
def test_other_systems_are_told_so_without_a_command(package, reason, monkeypatch, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    add(package, {"built": False, "reason": "the wheel for every system has none"})
    assert reason() == (
        "the native kernels are made for Linux on x86_64 and aarch64, "
        f"this is {system} on {machine}"
    )


@pytest.mark.parametrize("torch_version", ["2.13.0", "2.13.1+cpu", "2.13.0a0+gitabc"])
@pytest.mark.parametrize("content", ["", "no library"])
def test_a_library_that_does_not_load_is_a_reason(
    package, problem, monkeypatch, torch_version, content
):
    monkeypatch.setattr(native, "load", LOAD)
    monkeypatch.setattr(torch, "__version__", torch_version)
    add(package, {**RECORD, "torch": "2.13.0+cu130"}, "2.13", content)
    assert re.search(r"libtxl_kernels.so does not load \(.*(file too short|invalid ELF)", problem())


def test_a_record_without_its_library_is_a_reason(package, problem, monkeypatch):
    monkeypatch.setattr(native, "load", LOAD)
    add(package, RECORD, MINOR)
    native.library_path().unlink()
    assert "No such file or directory" in problem()


def test_a_torch_without_any_product_of_tiles_is_a_reason(package, reason, monkeypatch):
    add(package, RECORD, MINOR)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "_products_refusal", lambda: "no products here")
    assert reason() == "no products here"
