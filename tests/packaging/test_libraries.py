"""What the native library loads into a process: torch's own libraries; its record; its symbols."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from txl_kernels.backends import native
from txl_kernels.backends import native_installation as installation

REASON = native.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")

LOADED_LIBRARIES = """
from torch._subclasses.fake_tensor import FakeTensorMode
from txl_kernels.backends import native
with FakeTensorMode():  # the first use may be a trace
    assert native.unavailable_reason() is None
print({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line})
"""


def needed(path: Path) -> set[str]:
    """The libraries that a library is linked to."""
    dynamic = readelf("-d", path)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    return {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}


def readelf(option: str, path: Path) -> str:
    command = ["readelf", "--wide", option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def module() -> Path:
    return Path(pytest.importorskip("txl_kernels._C").__file__)


def test_the_record_beside_the_library_is_the_library_s_own():
    path = native.library_path()
    record = json.loads(path.with_name(installation.RECORD_NAME).read_text(encoding="utf-8"))
    extension = pytest.importorskip("txl_kernels._C")
    assert extension.build_info(str(path)) == record
    assert native.build_info() == record
    for name, sha in record["interface"].items():
        assert hashlib.sha256((installation.PACKAGE_DIR / name).read_bytes()).hexdigest() == sha


def test_without_the_module_the_record_is_read_from_its_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "txl_kernels._C", None)  # any import of it raises
    assert native.build_info.__wrapped__() == native.build_info()


def test_the_module_reads_the_record_of_loaded_libraries_only(tmp_path):
    extension = pytest.importorskip("txl_kernels._C")
    copy = shutil.copy(native.library_path(), tmp_path)
    with pytest.raises(ValueError, match=f"library must be loaded, got {copy}"):
        extension.build_info(copy)
    with pytest.raises(ValueError, match="must have the symbol txl_build_record"):
        extension.build_info(str(Path(torch.__file__).parent / "lib" / "libc10.so"))


def test_one_openmp_runtime_is_loaded_torch_s():
    loaded = subprocess.run(
        [sys.executable, "-c", LOADED_LIBRARIES], capture_output=True, text=True, check=True
    ).stdout
    names = {Path(path).name for path in eval(loaded)}
    runtimes = {name for name in names if name.startswith(("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1, runtimes
    assert installation.LIBRARY_NAME in names
    assert not {path for path in eval(loaded) if "/txl_kernels/_C." in path}


@needs_readelf
def test_the_library_names_no_path_of_the_machine_that_built_it():
    libraries = needed(native.library_path())
    assert not {name for name in libraries if "gomp" in name or "/" in name}, libraries
    assert {"libc10.so", "libtorch_cpu.so"} <= libraries


@needs_readelf
def test_the_library_needs_no_python_and_the_module_no_torch():
    assert not {name for name in needed(native.library_path()) if "python" in name}
    assert not re.search(r"UND _?Py", readelf("--dyn-syms", native.library_path()))
    assert not {name for name in needed(module()) if "torch" in name or "c10" in name}


@needs_readelf
def test_the_record_is_the_only_visible_symbol():
    rows = (line.split() for line in readelf("--dyn-syms", native.library_path()).splitlines())
    visible = [row for row in rows if {"GLOBAL", "WEAK", "UNIQUE"}.intersection(row)]
    assert visible
    assert [row[-1] for row in visible if "UND" not in row] == ["txl_build_record"]


@needs_readelf
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets of x86-64")
def test_wide_instructions_stand_only_in_functions_named_after_their_instruction_set():
    """What runs before the choice by processor must run on every x86-64."""
    if ".symtab" not in readelf("--section-headers", native.library_path()):
        pytest.skip("the library is stripped, as in a wheel: its functions have no names")
    listing = subprocess.Popen(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(native.library_path())],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert listing.stdout is not None
    function, wide = "", {}
    for line in listing.stdout:
        if line.endswith(">:\n"):
            function = line
        elif re.search(r"%[yz]mm|\bv[a-z0-9]+s[sd] ", line):
            wide[function] = line
    assert listing.wait() == 0
    assert wide, "no function is compiled for a wide instruction set"
    assert not {name: line for name, line in wide.items() if "AVX" not in name}
