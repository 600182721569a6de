"""The distributions, with stand-ins for compiled files: contents, tags, the same bytes twice."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("auditwheel")

from tools.wheels import distributions

ROOT = Path(__file__).resolve().parents[3]
EPOCH = 1_700_000_000
LIBRARY = 'extern "C" { extern const char txl_build_record[] VISIBLE; '
LIBRARY += 'const char txl_build_record[] = "{}"; }\n'
MODULE = "_C.cpython-311-x86_64-linux-gnu.so"
# dlsym has a new version since glibc 2.34.
TOO_NEW = (
    "#include <dlfcn.h>\nVISIBLE void* find(const char* name) { return dlsym(nullptr, name); }\n"
)
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the wheel is for x86-64"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the files that git tracks"),
]


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory, compile_library):
    """Compiled files for two versions of torch and one Python."""
    folder = tmp_path_factory.mktemp("prebuilt")
    name = "_schemas.py"
    interface = {name: hashlib.sha256((ROOT / "txl_kernels" / name).read_bytes()).hexdigest()}
    for torch in ("2.11", "2.13"):
        library = folder / "_native" / f"torch-{torch}" / "libtxl_kernels.so"
        compile_library(library, LIBRARY + f'VISIBLE const char* torch = "{torch}";\n')
        record = {"built": True, "torch": f"{torch}.0", "interface": interface}
        library.with_name("build.json").write_text(json.dumps(record))
    compile_library(folder / MODULE, 'extern "C" VISIBLE void* PyInit__C() { return nullptr; }\n')
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return distributions.build_sdist(ROOT, tmp_path_factory.mktemp("dist"), EPOCH)


@pytest.fixture(scope="module")
def native_wheel(tmp_path_factory, sdist, prebuilt):
    output = tmp_path_factory.mktemp("native")
    return distributions.build_native_wheel(sdist, prebuilt, output, EPOCH)


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_has_a_library_for_each_torch_and_a_module_for_each_python(
    native_wheel, prebuilt
):
    assert native_wheel.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")
    files = members(native_wheel)
    for torch in ("2.11", "2.13"):
        name = f"_native/torch-{torch}/libtxl_kernels.so"
        assert files[f"txl_kernels/{name}"] == (prebuilt / name).read_bytes()
    assert f"txl_kernels/{MODULE}" in files
    assert "txl_kernels/_native/build.json" not in files
    (tags,) = (text for name, text in files.items() if name.endswith(".dist-info/WHEEL"))
    assert b"Tag: py3-none-manylinux_2_28_x86_64\n" in tags
    assert b"Root-Is-Purelib: false" in tags


def test_the_wheel_for_every_system_says_that_it_has_no_native_part(tmp_path, sdist, native_wheel):
    wheel = distributions.build_pure_wheel(sdist, tmp_path, EPOCH)
    assert wheel.name.endswith("-py3-none-any.whl")
    files = members(wheel)
    record = json.loads(files["txl_kernels/_native/build.json"])
    assert record["built"] is False
    assert "every system" in record["reason"]
    assert not [name for name in files if name.endswith(".so")]
    python_files = {name for name in files if name.endswith((".py", ".yaml", ".json", ".typed"))}
    native_files = set(members(native_wheel))
    assert python_files - native_files == {"txl_kernels/_native/build.json"}


def test_the_same_sources_give_the_same_bytes_in_another_folder(
    tmp_path, sdist, native_wheel, prebuilt
):
    copy, output = tmp_path / "another folder", tmp_path / "output"
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    (copy / "txl_kernels" / "untracked.py").touch()
    subprocess.run(["git", "init", "--quiet", str(copy)], check=True)
    add = ["git", "-C", str(copy), "add", "--all", "--force", "--", ":!txl_kernels/untracked.py"]
    subprocess.run(add, check=True)
    output.mkdir()
    before = os.umask(0o077)
    try:
        other = distributions.build_sdist(copy, output, EPOCH)
        shutil.copytree(prebuilt, tmp_path / "prebuilt")
        wheel = distributions.build_native_wheel(other, tmp_path / "prebuilt", output, EPOCH)
    finally:
        os.umask(before)
    assert other.read_bytes() == sdist.read_bytes()
    assert wheel.read_bytes() == native_wheel.read_bytes()


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.34"), reason="needs a newer glibc")
def test_a_symbol_that_is_too_new_for_the_tag_is_refused(
    tmp_path, sdist, prebuilt, compile_library
):
    copy = tmp_path / "prebuilt"
    shutil.copytree(prebuilt, copy)
    compile_library(copy / "_native/torch-2.11/libtxl_kernels.so", LIBRARY + TOO_NEW)
    with pytest.raises(SystemExit, match="too-recent versioned symbols"):
        distributions.build_native_wheel(sdist, copy, tmp_path / "output", EPOCH)
    assert not list(tmp_path.glob("output/*"))
