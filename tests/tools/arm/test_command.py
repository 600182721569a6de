"""`python -m tools.arm` without a cross compiler: messages, interruptions, emulated files."""

from __future__ import annotations

import pytest

from tools.arm import __main__ as arm
from tools.arm import stubs, system


def test_missing_programs_are_one_sentence_with_the_command_that_installs_them(tmp_path):
    present = tmp_path / "keyring"
    present.touch()
    arm.check_requirements({str(present): "a-keyring", "sh": "dash"})
    with pytest.raises(SystemExit) as error:
        arm.check_requirements({"no-such-g++": "g++-a", "sh": "dash", "no-such-qemu": "qemu-a"})
    message = str(error.value)
    assert message.startswith("tools.arm: g++-a and qemu-a must be installed;")
    assert message.endswith("apt-get install g++-a qemu-a")
    assert "\n" not in message


def test_an_interrupted_installation_is_not_used(tmp_path):
    folder = tmp_path / "site"

    def interrupted(part):
        (part / "half").touch()
        raise KeyboardInterrupt

    def complete(part):
        (part / "whole").touch()

    with pytest.raises(KeyboardInterrupt):
        arm.make(folder, interrupted)
    assert not folder.exists()
    arm.make(folder, complete)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    arm.make(folder, interrupted)  # complete: nothing is called


def test_every_processor_is_described(tmp_path):
    system.describe_processor(tmp_path)
    cpuinfo = (tmp_path / "proc" / "cpuinfo").read_text("utf-8")
    assert cpuinfo.count("CPU part\t: 0xd0c") == system.N_CPU
    registers = tmp_path.glob("sys/devices/system/cpu/cpu*/regs/identification/midr_el1")
    assert [path.read_text("utf-8").strip() for path in registers] == [system.MIDR] * system.N_CPU


TABLE = """
Symbol table '.dynsym' contains 6 entries:
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     0: 0000000000000000     0 NOTYPE  LOCAL  DEFAULT  UND
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND cudaFree@libcudart.so.13 (3)
     2: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND ncclSend
     3: 0000000000000000     0 NOTYPE  WEAK   DEFAULT  UND __gmon_start__
     4: 0000000000001000    64 FUNC    GLOBAL DEFAULT   12 sgemm_@@blas.so.0
     5: 0000000000001040    64 OBJECT  WEAK   DEFAULT   13 table
"""
VERSIONS = """
Version needs section '.gnu.version_r' contains 2 entries:
  000000: Version: 1  File: libcudart.so.13  Cnt: 1
  0x0010:   Name: libcudart.so.13  Flags: none  Version: 3
  0x0020: Version: 1  File: libc.so.6  Cnt: 1
  0x0030:   Name: GLIBC_2.17  Flags: none  Version: 2
"""


def test_stubs_have_the_symbols_that_torch_needs_and_no_others(monkeypatch, tmp_path):
    tables = {"--dyn-syms": TABLE, "--version-info": VERSIONS}
    monkeypatch.setattr(stubs, "_readelf", lambda option, library: tables[option])
    library = tmp_path / "libtorch_cuda.so"
    assert stubs._undefined([library]) == {"ncclSend"}
    assert stubs._defined([library]) == {"sgemm_", "table"}
    versions = stubs._required_versions([library], {"libcudart.so.13", "libnccl.so.2"})
    assert versions == {"libcudart.so.13": {"libcudart.so.13": {"cudaFree"}}}
