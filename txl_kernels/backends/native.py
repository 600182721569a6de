"""The native backend's door: whether `txl_kernels._C` may be loaded here, and loading it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGE_DIR = Path(__file__).resolve().parents[1]
RECORD_NAME = "_native_build.json"
_THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def load() -> ModuleType:
    """Loads `_C` once, which registers the kernels as `torch.ops.txl_native.*`; returns it.

    Raises:
        ImportError: `_C` is missing or does not load (`unavailable_reason` says why).
    """
    return importlib.import_module("txl_kernels._C")


@functools.cache
def unavailable_reason() -> str | None:
    """None where the native kernels are loaded and ready, else one sentence that says why not.

    The build record beside `_C` is judged before anything is loaded. Never raises.
    """
    reason = _refusal(PACKAGE_DIR, torch.__version__)
    if reason is not None:
        return reason
    try:
        library = load()
    except (ImportError, OSError) as error:
        return f"txl_kernels._C in {PACKAGE_DIR} does not load: {error}"
    no_products: str | None = library.gemm_unavailable_reason()
    return no_products


def build_command() -> str:
    """The command that builds the kernels for this Python and its torch."""
    checkout = PACKAGE_DIR.parent
    source = checkout if (checkout / "setup.py").exists() else "."
    python = shlex.quote(sys.executable)
    options = "--force-reinstall --no-deps --no-cache-dir"
    return f"{python} -m pip install {options} {shlex.quote(str(source))}"


def no_kernel_reason(op: str, device_type: str) -> str:
    """Says that the loaded library has no kernel for `op` on this kind of device, and why."""
    cuda = load().build_info()["cuda"]
    built_without = device_type == "cuda" and not cuda["built"]
    why = f" ({cuda['reason']})" if built_without else ""
    return f"the native library here has no {device_type.upper()} kernel for {op}{why}"


def _refusal(package_dir: Path, torch_version: str) -> str | None:
    """Why the build in `package_dir` must not be loaded under `torch_version`, or None."""
    path = package_dir / RECORD_NAME
    if not path.exists():
        return _no_record(package_dir)
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not record["built"]:
            return f"txl_kernels was installed without its native part: {record['reason']}"
        built_for, python = str(record["torch"]), str(record["python"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the build record {path} is unreadable ({error!r}): build again"
    if _minor(built_for) != _minor(torch_version):
        return (
            f"txl_kernels._C was built for torch {built_for}, and torch {torch_version} is here: "
            "build again"
        )
    if python != _THIS_PYTHON:
        return f"txl_kernels._C was built for Python {python}, this is {_THIS_PYTHON}: build again"
    return None


def _no_record(package_dir: Path) -> str:
    """Why there is no build record: an installed package hidden behind a checkout, or no build."""
    for distribution in importlib.metadata.distributions(name="transformer-xl"):
        installed = Path(str(distribution.locate_file("txl_kernels")))
        if (installed / RECORD_NAME).exists() and installed.resolve() != package_dir:
            return (
                f"txl_kernels was imported from {package_dir}, where no _C is built, in front of "
                f"the one installed in {installed}: run from another folder, or `make build` there"
            )
    return (
        f"txl_kernels in {package_dir} has no _C: it was never built (pip install, or `make build`)"
    )


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])
