"""Python packages for aarch64: PyTorch's wheel, its requirements and those of the tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PLATFORM = "manylinux_2_28_aarch64"
PYTHON = "3.11"  # that of Debian's suite
# torch's requirements without CUDA, then those of the tests (pyproject.toml's limit of numpy).
PACKAGES = (
    *("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions"),
    *("hypothesis", "numpy<2.4", "pytest", "pytest-timeout"),
)


def install(folder: Path, torch: Sequence[str]) -> None:
    """Installs the packages and torch into `folder`, for the emulated machine.

    Args:
        folder: the emulated Python's site-packages.
        torch: pip's arguments for torch. Its CUDA libraries are not installed.
    """
    pip = [
        *(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("install", "--target", str(folder), "--only-binary=:all:", "--no-compile"),
        *("--platform", PLATFORM, "--implementation", "cp", "--python-version", PYTHON),
    ]
    subprocess.run([*pip, *PACKAGES], check=True)
    # --upgrade: both installations write to the folder `bin`.
    subprocess.run([*pip, "--upgrade", "--no-deps", *torch], check=True)
