"""Paths as users write them, JSON that every reader accepts, and locks between processes."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock


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


def linked(directory: Path) -> Path:
    """The directory that a symbolic link names, which need not exist yet; else the given one."""
    return directory.resolve() if directory.is_symlink() else directory


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
