"""What `txl_kernels._C` brings into a process: its record, torch's own libraries, nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from txl_kernels.backends import native

REASON = native.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LOADED_LIBRARIES = """
from txl_kernels.backends import native
native.load()
print({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line})
"""


def extension() -> str:
    from txl_kernels import _C

    return str(_C.__file__)


def test_the_record_beside_the_library_is_the_library_s_own():
    from txl_kernels import _C

    record = json.loads((native.PACKAGE_DIR / native.RECORD_NAME).read_text(encoding="utf-8"))
    assert _C.build_info() == record


def test_one_openmp_runtime_is_loaded_torch_s():
    loaded = subprocess.run(
        [sys.executable, "-c", LOADED_LIBRARIES], capture_output=True, text=True, check=True
    ).stdout
    names = {Path(path).name for path in eval(loaded)}
    runtimes = {name for name in names if name.startswith(("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1, runtimes
    assert any(name.startswith("_C.") for name in names)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_library_names_no_path_of_the_machine_that_built_it():
    dynamic = subprocess.run(
        ["readelf", "-d", extension()], capture_output=True, text=True, check=True
    ).stdout
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    assert not {name for name in needed if "gomp" in name or "/" in name}, needed


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_wide_instructions_stand_only_in_functions_named_after_their_instruction_set():
    """What runs before the choice by processor must run on every x86-64."""
    listing = subprocess.Popen(
        ["objdump", "-d", "-C", "--no-show-raw-insn", extension()],
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
