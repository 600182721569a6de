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
def locked(path: Path, *, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path`, which is there only while it is held or if its holder was killed.

    The lock ends with its process, however that ends, and can be taken again by the same thread.

    Args:
        path: of the lock file; its folder is made.
        timeout: seconds to wait for another holder; negative: without limit.

    Raises:
        TimeoutError: another process or thread held the lock for all that time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=True)
    with lock.acquire(timeout=timeout):
        try:
            yield
        finally:
            if lock.lock_counter == 1:
                path.unlink(missing_ok=True)
