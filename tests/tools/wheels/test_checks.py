"""The checks of compiled files find planted faults, and sound files pass."""

from __future__ import annotations

import pytest

from tools.wheels import checks

LIBRARY = 'extern "C" { extern const char txl_build_record[] VISIBLE; '
LIBRARY += 'const char txl_build_record[] = "{}"; }\n'
MODULE = 'extern "C" VISIBLE void* PyInit__C() { return nullptr; }\n'
CALLS_TORCH = "void in_torch(); __attribute__((used)) void call() { in_torch(); }\n"
CALLS_OPENMP = (
    'extern "C" void GOMP_barrier(); __attribute__((used)) void f() { GOMP_barrier(); }\n'
)


@pytest.fixture
def torch_dir(tmp_path, compile_library):
    """A torch whose libraries define one function."""
    for name, source in (
        ("libtorch_cpu.so", "VISIBLE void in_torch() {}\n"),
        ("libc10.so", "VISIBLE void in_c10() {}\n"),
    ):
        compile_library(tmp_path / "torch" / "lib" / name, source)
    return tmp_path / "torch"


def test_sound_files_pass(tmp_path, compile_library, torch_dir):
    library = compile_library(tmp_path / "libtxl_kernels.so", LIBRARY + CALLS_TORCH + CALLS_OPENMP)
    module = compile_library(tmp_path / "_C.cpython-311-x86_64-linux-gnu.so", MODULE)
    assert checks.failures(library, torch_dir, [tmp_path]) == []
    assert checks.failures(module, None, [tmp_path]) == []


@pytest.mark.parametrize(
    ("source", "options", "strip", "failure"),
    [
        (LIBRARY + "VISIBLE void extra() {}\n", [], True, "it exports _Z5extrav txl_build_record"),
        ("", [], True, "must export txl_build_record alone"),
        (LIBRARY, [], False, "must be stripped"),
        (LIBRARY, ["-Wl,-rpath,/somewhere"], True, "must have no search path"),
        (LIBRARY + "void unknown(); VISIBLE void* f = (void*)&unknown;", [], True, "_Z7unknownv"),
    ],
    ids=["an extra symbol", "no record", "not stripped", "rpath", "a symbol that torch lacks"],
)
def test_a_fault_is_found(tmp_path, compile_library, torch_dir, source, options, strip, failure):
    library = compile_library(tmp_path / "libtxl_kernels.so", source, *options, strip=strip)
    assert failure in " ".join(checks.failures(library, torch_dir, []))


def test_a_path_of_the_machine_is_found(tmp_path, compile_library, torch_dir):
    path = f'VISIBLE const char* path = "{tmp_path}/csrc/x.h";\n'
    library = compile_library(tmp_path / "libtxl_kernels.so", LIBRARY + path)
    assert f"must not contain the path {tmp_path}" in " ".join(
        checks.failures(library, torch_dir, [tmp_path])
    )
