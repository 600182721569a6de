"""The native backend: its library for the installed torch, why there is none, how to build it.

The folder `_native` of the package has a library for each minor version of torch that it was built
for. Beside it is its build record (JSON), which is checked before anything is loaded:

    _native/torch-2.13/libtxl_kernels.so, _native/torch-2.13/build.json
    _native/build.json        where nothing was built: the reason

Imports never fail because of the native part: whatever is missing or damaged is a reason, with the
command that completes the installation.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from txl_kernels.errors import BackendUnavailableError

PACKAGE_DIR = Path(__file__).resolve().parents[1]
FOLDER = "_native"
LIBRARY_NAME = "libtxl_kernels.so"
RECORD_NAME = "build.json"
# The record of earlier versions of this package, in which `_C` contained the kernels.
EARLIER_RECORD_NAME = "_native_build.json"
PROCESSORS = ("x86_64", "aarch64")
_COMMAND_FOLLOWS = "; this command builds the kernels: "
# Without these options pip and uv install a wheel again that they built and cached earlier.
_OPTIONS = "--force-reinstall --no-deps --no-cache-dir"


def library_path() -> Path:
    """The library for the installed torch, whether or not it exists."""
    return _folder(PACKAGE_DIR, torch.__version__) / LIBRARY_NAME


def load() -> None:
    """Loads the library, which registers the kernels as `torch.ops.txl_native.*`.

    Raises:
        OSError: the library is missing or does not load (`unavailable_reason` says why).
    """
    torch.ops.load_library(str(library_path()))  # type: ignore[no-untyped-call]


@functools.cache
def build_info() -> dict[str, Any]:
    """What the library was built for and with: the build record.

    `_C` reads the record that is compiled into the loaded library. Without a `_C` for this Python,
    it is read from the file beside the library.

    Raises:
        OSError: the library is missing or does not load.
    """
    load()
    path = library_path()
    try:
        if (PACKAGE_DIR / EARLIER_RECORD_NAME).exists():
            raise ImportError("_C may be that of an earlier version, which would load its kernels")
        module = importlib.import_module("txl_kernels._C")
    except ImportError:
        return _read_record(path.with_name(RECORD_NAME))
    record: dict[str, Any] = module.build_info(os.fsencode(path))
    return record


def register_kernels() -> None:
    """Adds kernels to the operators of `torch.ops.txl_native` that load the library at first use.

    A program that torch exported or compiled earlier calls the operators themselves, in a process
    where no public op has loaded it. The kernels in the library then replace these.
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

    The sentence ends with the command that builds them, where a build helps. The build record is
    checked before anything is loaded. Never raises.
    """
    reason = _refusal(PACKAGE_DIR, torch.__version__)
    if reason is not None:
        return reason
    try:
        load()
        return _products_refusal()
    except (OSError, AttributeError, RuntimeError) as error:
        why = error.__cause__ or error
        return _with_command(f"the native library {library_path()} does not load ({why})")


def _products_refusal() -> str | None:
    """Why the loaded library cannot compute products here, or None.

    The operator is called in another thread: where the caller traces or uses fake tensors, its own
    thread would record the call instead of running it.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        operator = torch.ops.txl_native.gemm_unavailable_reason
        reason: str | None = executor.submit(operator).result()
        return reason


def build_command() -> str:
    """The shell command that builds the kernels for this Python and its torch."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is not None:
        return f"{python} -m pip install {_OPTIONS} {_source()}"
    # An environment of uv: its builds cannot see which environment they are for.
    setting = "--global-option=" + shlex.quote(f"--torch-python={sys.executable}")
    installer = f"uv pip install --python {python} --config-settings={shlex.quote(setting)}"
    return f"{installer} {_OPTIONS} {_source()}"


def without_command(reason: str) -> str:
    """A reason without the command at its end, for places that show the command once."""
    return reason.split(_COMMAND_FOLLOWS)[0]


def _with_command(problem: str) -> str:
    return f"{problem}{_COMMAND_FOLLOWS}{build_command()}"


def _source() -> str:
    """The command's last words: the checkout, or the place that this package was installed from.

    Where that is a wheel or no longer exists, the sources of the same version from the index.
    """
    checkout = PACKAGE_DIR.parent
    if (checkout / "setup.py").exists():
        return f"-e {shlex.quote(str(checkout))}"
    for distribution in importlib.metadata.distributions(name="transformer-xl"):
        if _folder_of(distribution) == PACKAGE_DIR:
            source = _requirement(distribution.read_text("direct_url.json"))
            if source is not None:
                return shlex.quote(source)
            return f"--no-binary transformer-xl transformer-xl=={distribution.version}"
    return ".  # in a checkout of transformer-xl"


def _requirement(text: str | None) -> str | None:
    """A source that pip can build from, or None for wheels and for files that no longer exist.

    Args:
        text: content of a `direct_url.json` (PyPA's "recording the direct URL origin"), or None.
    """
    try:
        origin = json.loads(text or "")
        url = urlsplit(str(origin["url"]))
        if "vcs_info" in origin:
            return f"{origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    except (ValueError, KeyError, TypeError):  # no such file, or it is damaged
        return None
    if url.path.endswith(".whl"):
        return None
    if url.scheme != "file":
        return str(origin["url"])
    path = url2pathname(url.path)
    return path if Path(path).exists() else None


def _folder_of(distribution: importlib.metadata.Distribution) -> Path:
    """The folder of txl_kernels in an installed distribution."""
    return Path(str(distribution.locate_file("txl_kernels"))).resolve()


@functools.cache
def no_kernel_reason(op: str, device_type: str) -> str:
    """Says that the loaded library has no kernel for `op` on this kind of device, and why."""
    cuda = build_info()["cuda"]
    built_without = device_type == "cuda" and not cuda["built"]
    why = f" ({cuda['reason']})" if built_without else ""
    return f"the native library here has no {device_type.upper()} kernel for {op}{why}"


def _refusal(package_dir: Path, torch_version: str) -> str | None:
    """Why no library in `package_dir` may be loaded under `torch_version`, or None."""
    folder = _folder(package_dir, torch_version)
    path = folder / RECORD_NAME
    if not path.exists() and not (folder / LIBRARY_NAME).exists():
        return _not_built(package_dir, torch_version)
    try:
        record = _read_record(path)
        built_for, interface = str(record["torch"]), dict(record["interface"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _unreadable(path, error)
    if _minor(built_for) != _minor(torch_version):
        return _built_for_another(f"{built_for} in {folder}", record, torch_version)
    changed = [name for name, sha in interface.items() if _differs(package_dir / name, sha)]
    if changed:
        return _with_command(
            f"the native library in {folder} was built from other sources than those of "
            f"txl_kernels here (changed: {', '.join(changed)})"
        )
    return None


def _differs(path: Path, sha256: str) -> bool:
    """Whether a file of this package is not the one of the build; False if it is not installed."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != sha256


def _not_built(package_dir: Path, torch_version: str) -> str:
    """Why there is no library for this torch."""
    if platform.system() != "Linux" or platform.machine() not in PROCESSORS:
        here = f"{platform.system()} on {platform.machine()}"
        return f"the native kernels are made for Linux on {_listed(PROCESSORS)}, this is {here}"
    path = package_dir / FOLDER / RECORD_NAME
    if path.exists():
        try:
            reason = str(_read_record(path)["reason"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return _unreadable(path, error)
        return _with_command(f"txl_kernels was installed without its native part: {reason}")
    libraries = sorted(
        (package_dir / FOLDER).glob(f"torch-*/{LIBRARY_NAME}"), key=lambda x: _number(x.parent.name)
    )
    if len(libraries) == 1:
        return _built_for_one(libraries[0].parent, torch_version)
    if libraries:
        versions = _listed([path.parent.name.removeprefix("torch-") for path in libraries])
        return _with_command(
            f"txl_kernels in {package_dir} has native libraries for torch {versions}, but torch "
            f"{torch_version} is installed here"
        )
    return _no_record(package_dir)


def _built_for_one(folder: Path, torch_version: str) -> str:
    try:
        record = _read_record(folder / RECORD_NAME)
        return _built_for_another(str(record["torch"]), record, torch_version)
    except (OSError, ValueError, KeyError, TypeError):
        return _built_for_another(folder.name.removeprefix("torch-"), {}, torch_version)


def _built_for_another(built_for: str, record: dict[str, Any], torch_version: str) -> str:
    interpreter = record.get("interpreter")
    origin = f" of {interpreter}" if interpreter else ""
    return _with_command(
        f"the native library of txl_kernels was built for torch {built_for}{origin}, "
        f"but torch {torch_version} is installed here"
    )


def _unreadable(path: Path, error: Exception) -> str:
    return _with_command(f"the build record {path} is unreadable ({error!r})")


def _no_record(package_dir: Path) -> str:
    """Why there is no record: a checkout hides the installed package, or nothing was built."""
    if (package_dir / EARLIER_RECORD_NAME).exists():
        return _with_command(
            f"the native part in {package_dir} was built by an earlier version of txl_kernels"
        )
    for distribution in importlib.metadata.distributions(name="transformer-xl"):
        installed = _folder_of(distribution)
        if (installed / FOLDER).exists() and installed != package_dir:
            return _with_command(
                f"txl_kernels was imported from {package_dir}, where no native library is built, "
                f"instead of {installed}, where it is installed: run from another folder, or build "
                "in the checkout"
            )
    return _with_command(f"txl_kernels in {package_dir} has no native library: it was never built")


def _read_record(path: Path) -> dict[str, Any]:
    """A build record.

    Raises:
        OSError, ValueError, TypeError: the file cannot be read, or holds no JSON object.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise TypeError(f"expected a JSON object, got {type(record).__name__}")
    return record


def _folder(package_dir: Path, torch_version: str) -> Path:
    """The folder of the library for a version of torch."""
    return package_dir / FOLDER / f"torch-{_minor(torch_version)}"


def _minor(version: str) -> str:
    """The major and minor version, such as "2.13"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _number(folder: str) -> tuple[int, ...]:
    """The version in the name of a folder, for sorting."""
    parts = folder.removeprefix("torch-").split(".")
    return tuple(int(part) if part.isdecimal() else 0 for part in parts)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
