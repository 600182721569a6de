"""csrc/portable.cpp: a file linked with it needs no symbol too new for manylinux_2_28."""

from __future__ import annotations

import ctypes
import math
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Uses everything that portable.cpp replaces.
SOURCE = """
#include <cmath>
#include <dlfcn.h>
#include <exception>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

extern "C" {

double exp_log(double x) { return std::exp(std::log(x)); }

// 3 if an exception lives as long as its last reference.
int references() {
  struct Counted : std::runtime_error {
    std::shared_ptr<int> alive;
    explicit Counted(std::shared_ptr<int> x) : std::runtime_error(""), alive(std::move(x)) {}
  };
  const auto alive = std::make_shared<int>(0);
  std::exception_ptr kept;
  try {
    throw Counted(alive);
  } catch (...) {
    kept = std::current_exception();
  }
  std::vector<std::exception_ptr> copies(5, kept);
  kept = nullptr;
  const bool shared = alive.use_count() == 2;
  copies.resize(1);
  const bool last = alive.use_count() == 2;
  copies.clear();
  return shared + last + (alive.use_count() == 1);
}

int too_long(std::size_t n) {
  try {
    std::vector<double>().reserve(1);
    std::allocator<double>().allocate(n);
    return 0;
  } catch (const std::bad_array_new_length&) {
    return 1;
  }
}

int length(int x) {
  std::ostringstream text;
  text << "number " << x;
  return text.str().size();
}

bool finds(const char* library, const char* symbol) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  const bool found = handle != nullptr && dlsym(handle, symbol) != nullptr;
  return handle == nullptr ? dlerror() == nullptr : found && dlclose(handle) == 0;
}
}
"""
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("needs g++ on Linux")
    folder = tmp_path_factory.mktemp("portable")
    (folder / "uses.cpp").write_text(SOURCE)
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    (wrapped,) = re.findall(r"set\(TXL_WRAPPED (.*?)\)", text)
    (folder / "exports.map").write_text(
        "{ global: exp_log; references; too_long; length; finds; local: *; };"
    )
    command = [
        *("g++", "-std=c++20", "-O0", "-fPIC", "-shared", "-o", str(folder / "portable.so")),
        *(str(folder / "uses.cpp"), str(ROOT / "csrc" / "portable.cpp")),
        *(f"-Wl,--wrap={name}" for name in wrapped.split()),
        f"-Wl,--version-script={folder / 'exports.map'}",
    ]
    subprocess.run(command, check=True)
    return folder / "portable.so"


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_every_symbol_is_old_enough(library):
    listing = subprocess.run(
        ["objdump", "-T", str(library)], capture_output=True, text=True, check=True
    ).stdout
    versions = re.findall(r"\((GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\)\s+(\S+)", listing)
    assert len(versions) > 10
    too_new = [
        symbol
        for name, version, symbol in versions
        if tuple(map(int, version.split("."))) > NEWEST[name]
    ]
    assert not too_new


def test_the_replacements_do_the_same(library):
    loaded = ctypes.CDLL(str(library))
    loaded.exp_log.restype, loaded.exp_log.argtypes = ctypes.c_double, [ctypes.c_double]
    for x in (0.3, 1.0, 7.5e200):
        assert loaded.exp_log(x) == math.exp(math.log(x))
    assert loaded.exp_log(0.0) == 0.0
    assert math.isnan(loaded.exp_log(-1.0))
    assert loaded.references() == 3
    loaded.too_long.argtypes = [ctypes.c_size_t]
    assert loaded.too_long(2**62) == 1
    assert loaded.length(-12) == len("number -12")
    loaded.finds.restype = ctypes.c_bool
    assert loaded.finds(str(library).encode(), b"exp_log")
    assert not loaded.finds(str(library).encode(), b"no such function")
    assert not loaded.finds(b"/no/such/library.so", b"exp_log")
