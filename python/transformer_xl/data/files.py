"""Paths as users write them, files that may come from strangers, JSON that every reader accepts,
and locks between processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def expanded(path: str | Path) -> Path:
    """Return `path` with a leading `~` or `~user` replaced by the home directory.

    Shells leave `--out=~/runs` and `data.path=~/text` as they are.

    Raises:
        ValueError: the user has no home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


def linked(path: Path) -> Path:
    """The place that a symbolic link names, which need not exist yet; else the given one."""
    return resolved(path) if path.is_symlink() else path


def resolved(path: Path) -> Path:
    """The absolute path without symbolic links; a loop of links stays as it is."""
    return Path(os.path.realpath(path))  # Path.resolve raises RuntimeError for a loop


def check_regular(path: Path) -> None:
    """Raise an error for anything but a regular file, before it is opened.

    Opening a FIFO would wait for a writer, and a device may have no end.

    Raises:
        ValueError: a folder, a FIFO, a socket or a device.
        OSError: there is no such file, or it cannot be reached.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"{path}: expected a file, found {kind}")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is no regular file, not UTF-8 or not JSON.
        OSError: there is no such file, or it cannot be read.
    """
    check_regular(path)
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def parse_json(data: bytes | str) -> Any:
    """The content of JSON text, which may begin with a byte-order mark; else ValueError.

    NaN and infinities, which earlier versions wrote, are None, as `to_json` writes them.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        return json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:  # brackets may be nested too deeply
        raise ValueError(f"it is not JSON ({error})") from error


def is_int(value: Any, at_least: int = 0, at_most: int = (1 << 63) - 1) -> bool:
    """Whether a value of a JSON file is an integer (no bool) in this range."""
    return type(value) is int and at_least <= value <= at_most


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON text; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_with_nulls(value), indent=indent, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def locked(path: Path, *, timeout: float = -1) -> Iterator[bool]:
    """Hold the lock file `path`, which exists while it is held and after its holder was killed.

    The system releases the lock when its process ends, however it ends.

    Args:
        path: the lock file; its folder is created if necessary.
        timeout: seconds to wait for another holder; negative: without limit.

    Yields:
        True if the lock was acquired here, False if this thread held it already.

    Raises:
        TimeoutError: another process or thread held the lock during all of these seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=True)
    with lock.acquire(timeout=timeout):
        acquired = lock.lock_counter == 1
        try:
            yield acquired
        finally:
            if acquired:
                path.unlink(missing_ok=True)
