"""The native backend: whether `txl_kernels._C` can be loaded here, why not, and how to build it."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from txl_kernels.errors import BackendUnavailableError

PACKAGE_DIR = Path(__file__).resolve().parents[1]
RECORD_NAME = "_native_build.json"
_THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# Without these options pip and uv install a wheel again that they built and cached earlier.
_OPTIONS = "--force-reinstall --no-deps --no-cache-dir"
_INSTALL_AGAIN = f"install transformer-xl again with the options {_OPTIONS}"


def load() -> ModuleType:
    """Loads `_C` once, which registers the kernels as `torch.ops.txl_native.*`; returns it.

    Raises:
        ImportError: `_C` is missing or does not load (`unavailable_reason` says why).
    """
    return importlib.import_module("txl_kernels._C")


def register_kernels() -> None:
    """Adds a kernel to each operator of `torch.ops.txl_native` that loads `_C` at the first call.

    A program that torch exported or compiled earlier calls the operators themselves, in a process
    where no public op has loaded `_C`. The kernels in `_C` then replace these.
    """
    operators = torch.ops.txl_native
    for op, directions in (
        ("rel_attention", (operators.rel_attention_fwd, operators.rel_attention_bwd)),
        ("rel_shift", (operators.rel_shift_fwd, operators.rel_shift_bwd)),
        ("adaptive_nll", (operators.adaptive_nll_fwd, operators.adaptive_nll_bwd)),
        ("adaptive_loss", (operators.adaptive_loss_fwd, operators.adaptive_loss_bwd)),
        (
            "adaptive_embedding",
            (operators.adaptive_embedding_fwd, operators.adaptive_embedding_bwd),
        ),
    ):
        for operator in directions:
            name = str(operator.default.name())  # type: ignore[no-untyped-call]
            torch.library.impl(name, "default", _loading(op, operator))


def _loading(op: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        reason = unavailable_reason()
        if reason is None and _first_use.is_running:  # the library has no kernel for these tensors
            reason = no_kernel_reason(op, _device_type(args))
        if reason is not None:
            raise BackendUnavailableError(f"{op}: {reason}")
        _first_use.is_running = True
        try:
            return operator(*args)
        finally:
            _first_use.is_running = False

    return kernel


class _FirstUse(threading.local):
    """Whether this thread calls an operator again, after it has loaded the library."""

    is_running = False


_first_use = _FirstUse()


def _device_type(args: Sequence[Any]) -> str:
    """The kind of device of the first tensor: all tensors of a call are on one device."""
    tensors = (part for x in args for part in (x if isinstance(x, list) else [x]))
    return next(part.device.type for part in tensors if isinstance(part, torch.Tensor))


@functools.cache
def unavailable_reason() -> str | None:
    """None if the native kernels are loaded and ready, else one sentence that says why not.

    The build record beside `_C` is checked before anything is loaded. Never raises.
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
    """The shell command that builds the kernels for this Python and its torch."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is not None:
        return f"{python} -m pip install {_OPTIONS} {_source()}"
    # An environment of uv: its builds cannot see which environment they are for.
    setting = "--global-option=" + shlex.quote(f"--torch-python={sys.executable}")
    installer = f"uv pip install --python {python} --config-settings={shlex.quote(setting)}"
    return f"{installer} {_OPTIONS} {_source()}"


def _source() -> str:
    """The command's last words: the checkout, or the place that this package was installed from."""
    checkout = PACKAGE_DIR.parent
    if (checkout / "setup.py").exists():
        return f"-e {shlex.quote(str(checkout))}"
    for distribution in importlib.metadata.distributions(name="transformer-xl"):
        origin = distribution.read_text("direct_url.json")
        if origin is not None and _folder_of(distribution) == PACKAGE_DIR:
            source = _requirement(json.loads(origin))
            if source is not None:
                return shlex.quote(source)
    return ".  # in a checkout of transformer-xl"


def _requirement(origin: dict[str, Any]) -> str | None:
    """A source that pip can build from, or None for wheels and for files that no longer exist.

    Args:
        origin: content of a `direct_url.json` (PyPA's "recording the direct URL origin").
    """
    url = urlsplit(str(origin["url"]))
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    if url.path.endswith(".whl"):
        return None
    if url.scheme != "file":
        return str(origin["url"])
    path = url2pathname(url.path)
    return path if Path(path).exists() else None


def _folder_of(distribution: importlib.metadata.Distribution) -> Path:
    """The folder of txl_kernels in an installed distribution."""
    return Path(str(distribution.locate_file("txl_kernels"))).resolve()


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
        return f"the build record {path} is unreadable ({error!r}): {_INSTALL_AGAIN}"
    if _minor(built_for) != _minor(torch_version):
        interpreter = record.get("interpreter")
        origin = f" of {interpreter}" if interpreter else ""
        return (
            f"txl_kernels._C was built for torch {built_for}{origin}, "
            f"but torch {torch_version} is installed here: {_INSTALL_AGAIN}"
        )
    if python != _THIS_PYTHON:
        return (
            f"txl_kernels._C was built for Python {python}, but this is Python {_THIS_PYTHON}: "
            f"{_INSTALL_AGAIN}"
        )
    return None


def _no_record(package_dir: Path) -> str:
    """Why there is no record: a checkout hides the installed package, or nothing was built."""
    for distribution in importlib.metadata.distributions(name="transformer-xl"):
        installed = _folder_of(distribution)
        if (installed / RECORD_NAME).exists() and installed != package_dir:
            return (
                f"txl_kernels was imported from {package_dir}, where no _C is built, instead of "
                f"{installed}, where it is installed: run from another folder, or run "
                "`make build` in the checkout"
            )
    return (
        f"txl_kernels in {package_dir} has no _C: it was never built ({_INSTALL_AGAIN}, or run "
        "`make build` in a checkout)"
    )


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])
