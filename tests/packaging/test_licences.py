"""The distributions contain the licences, and the packages import nothing that downloads."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("LICENSE", "THIRD_PARTY_NOTICES")
BUILD = """
from setuptools import build_meta
print(build_meta.build_sdist("dist"), build_meta.build_wheel("dist"))
"""
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "socket", "urllib3"}


def test_sdist_and_wheel_contain_the_licences(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in (*FILES, "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for package in ("txl_kernels", "python/transformer_xl"):  # without the native part: no setup.py
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    command = [sys.executable, "-c", BUILD]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sdist, wheel = sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix == ".whl")
    stem = wheel.name.split("-py3")[0]  # name and version
    with tarfile.open(sdist) as tar, zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            assert any(entry.endswith(f"{stem}/{name}") for entry in tar.getnames()), name
            entry = f"{stem}.dist-info/licenses/{name}"
            assert archive.read(entry) == (ROOT / name).read_bytes()


def test_the_notices_name_all_that_is_compiled_in() -> None:
    notices = (ROOT / "THIRD_PARTY_NOTICES").read_text(encoding="utf-8")
    for name in ("pybind11", "PyTorch", "libstdc++", "GCC Runtime Library Exception"):
        assert name in notices
    assert notices.count("POSSIBILITY OF SUCH DAMAGE") == 2


def test_the_packages_open_no_connection() -> None:
    for package in ("txl_kernels", "python/transformer_xl"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                for name in names:
                    assert name.split(".")[0] not in NETWORK, f"{path} imports {name}"
                    # urllib.parse and url2pathname only take addresses apart
                    is_parsing = name.startswith("urllib.parse") or name.endswith("url2pathname")
                    assert is_parsing or not name.startswith("urllib"), f"{path} imports {name}"
                    assert not name.startswith("torch.hub"), f"{path} imports {name}"
