"""What a build of the wheels reads: wheels of torch, interpreters. Bad input is one clear error."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11")

from tools.wheels import __main__ as command
from tools.wheels import pythons, torches

FILES = {
    "torch/version.py": "__version__ = '2.13.0+cu130'\n",
    "torch/lib/libtorch_cpu.so": "cpu",
    "torch/lib/libc10.so": "c10",
    "torch/lib/libtorch_cuda.so": "large",
    "torch/include/ATen/ATen.h": "header",
    "torch/nn/__init__.py": "",
}
NAME = "torch-2.13.0+cu130-cp311-cp311-manylinux_2_28_x86_64.whl"


def wheel(folder, name=NAME, without=()):
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file, text in FILES.items():
            if file not in without:
                archive.writestr(file, text)
    return folder / name


def test_the_files_that_a_build_needs_are_unpacked_once(tmp_path, monkeypatch):
    path, cache = wheel(tmp_path), tmp_path / "cache"
    torch = torches.unpack(str(path), cache)
    assert torch == cache / "torch-2.13.0+cu130" / "torch"
    unpacked = {str(file.relative_to(torch.parent)) for file in torch.rglob("*") if file.is_file()}
    assert unpacked == set(FILES) - {"torch/lib/libtorch_cuda.so", "torch/nn/__init__.py"}
    assert [folder.name for folder in cache.iterdir()] == ["torch-2.13.0+cu130"]
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("unpacked again"))
    monkeypatch.setattr(torches.subprocess, "run", lambda *_: pytest.fail("downloaded again"))
    assert torches.unpack(str(path), cache) == torch
    assert torches.unpack("2.13.0", cache) == torch


@pytest.mark.parametrize(
    ("name", "without", "error"),
    [
        (NAME, ["torch/lib/libc10.so"], "has no torch/lib/libc10.so"),
        ("torch-2.13.0-cp311-cp311-win_amd64.whl", [], "for Linux on x86-64"),
        ("numpy-2.3.0-cp311-cp311-manylinux_2_28_x86_64.whl", [], "expected a wheel of torch"),
    ],
)
def test_another_wheel_is_refused(tmp_path, name, without, error):
    with pytest.raises(SystemExit, match=error):
        torches.unpack(str(wheel(tmp_path, name, without)), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_a_damaged_wheel_leaves_nothing(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(b"PK\x03\x04 half a download")
    with pytest.raises(SystemExit, match="cannot be unpacked"):
        torches.unpack(str(path), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("torch", ["2.13", "newest", "2.13.0+cpu"])
def test_a_torch_that_is_no_version_is_refused(tmp_path, torch):
    with pytest.raises(SystemExit, match=r"must be a version such as 2\.13\.0"):
        torches.unpack(torch, tmp_path)


def test_interpreters_are_checked(monkeypatch):
    python = pythons.named([sys.executable])[0]
    assert python.minor == sys.version_info.minor
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert Path(pythons.named([Path(sys.executable).name])[0].path).is_absolute()
    with pytest.raises(SystemExit, match="/bin/false is not"):
        pythons.named([sys.executable, "/bin/false"])
    with pytest.raises(SystemExit, match="a version twice"):
        pythons.named([sys.executable, sys.executable])


def test_the_time_of_the_files_is_checked(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(SystemExit, match="seconds since 1970, got 'yesterday'"):
        command.main(["--torch", "2.13.0"])
