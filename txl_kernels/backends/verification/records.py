"""Records of the kernels that passed a self-test, by device name and hash of the compiled kernel.

Three places are read: the file that this package ships, `share/transformer-xl` of the Python
environment, and the user's cache folder. Only the last one is written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = 1
SHIPPED = Path(__file__).resolve().parents[1] / "verified_kernels.json"
_lock = threading.Lock()
# Of this process: (device name, hash). Counts where no folder can be written.
_passed: set[tuple[str, str]] = set()


def cache_folder() -> Path:
    """The folder that records are written to: `$XDG_CACHE_HOME/transformer-xl/verified`.

    Raises:
        RuntimeError: the user has no home folder.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # the standard says to ignore it
        home = Path.home() / ".cache"
    return home / "transformer-xl" / "verified"


def image_folder() -> Path:
    """A second folder that is read, never written: for records made while an image is built.

    Set XDG_CACHE_HOME to `<sys.prefix>/share` for that build step.
    """
    return Path(sys.prefix) / "share" / "transformer-xl" / "verified"


def is_verified(device_name: str, kernel_hash: str) -> bool:
    """Whether this kernel passed a self-test, or a committed run of `make gpu`, on this device."""
    if (device_name, kernel_hash) in _passed or kernel_hash in _shipped().get(device_name, {}):
        return True
    folders = [image_folder()]
    with contextlib.suppress(RuntimeError):
        folders.insert(0, cache_folder())
    faults = []
    for folder in folders:
        path = _path(folder, device_name, kernel_hash)
        if not path.is_file():  # reading a FIFO would wait for a writer
            continue
        try:
            content = path.read_bytes()
        except OSError:
            continue
        fault = _fault(content, device_name)
        if fault is None:
            _passed.add((device_name, kernel_hash))
            return True
        faults.append(f"the record {path} {fault} and is ignored: the kernel is tested again")
    for text in faults:
        _warn(text)
    return False


def add(device_name: str, kernels: Mapping[str, str]) -> None:
    """Records kernels, {hash: label}, in this process and in the user's cache folder.

    Each record is a file of its own and is renamed into place, so that processes that write at
    the same time keep each other's records. If the folder cannot be written, every process tests
    once.
    """
    _passed.update((device_name, kernel_hash) for kernel_hash in kernels)
    with contextlib.suppress(OSError, RuntimeError):
        for kernel_hash, label in kernels.items():
            path = _path(cache_folder(), device_name, kernel_hash)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, {"version": VERSION, "device": device_name, "kernel": label})


def write_shipped(device_name: str, kernels: Mapping[str, str]) -> None:
    """Adds kernels, {hash: label}, to the file that this package ships, for a kind of device.

    Only `make gpu` calls this function.
    """
    with _lock:
        content: dict[str, dict[str, str]] = json.loads(SHIPPED.read_text(encoding="utf-8"))
        content[device_name] = dict(sorted({**content.get(device_name, {}), **kernels}.items()))
        _write(SHIPPED, dict(sorted(content.items())))
        _shipped.cache_clear()


@functools.cache
def _shipped() -> Mapping[str, Mapping[str, str]]:
    try:
        content: dict[str, dict[str, str]] = dict(json.loads(SHIPPED.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        _warn(f"{SHIPPED} is unreadable ({error}) and is ignored: install transformer-xl again")
        return {}
    return content


def _path(folder: Path, device_name: str, kernel_hash: str) -> Path:
    return folder / re.sub(r"[^\w.-]+", "_", device_name) / f"{kernel_hash}.json"


def _fault(content: bytes, device_name: str) -> str | None:
    """None if a file holds a record of this version and device, else why it does not."""
    try:
        record: Any = json.loads(content)
        version, device = record["version"], record["device"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "is damaged"
    if version != VERSION:
        return f"has version {version!r:.50}, not {VERSION},"
    return None if device == device_name else f"is one of {device!s:.100}"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a temporary file in the same folder and renames it."""
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        Path(temporary).chmod(0o644)  # mkstemp's 0o600 would hide an image's records from users
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
