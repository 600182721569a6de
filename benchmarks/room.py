"""Contenders that would need more memory than is free are refused before they allocate it."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.cases import PeerUnavailableError

MEMINFO = Path("/proc/meminfo")
RESERVE = 3 * 2**29  # bytes that estimates leave out: libraries, workspaces, other programs


class TooLargeError(PeerUnavailableError):
    """A contender does not fit into the memory; `n_bytes` is the estimate of its peak."""

    def __init__(self, n_bytes: int, free: int) -> None:
        super().__init__(f"needs {n_bytes:,} bytes, and {free:,} are free")
        self.n_bytes = n_bytes


def free() -> int:
    """Bytes that programs can allocate before the system swaps or ends one of them."""
    return meminfo("MemAvailable")


def meminfo(field: str) -> int:
    """A field of /proc/meminfo in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", MEMINFO.read_text(encoding="ascii"), re.M)
    assert found is not None
    return int(found[1]) * 1024


def require(n_bytes: int) -> None:
    """Raises TooLargeError if a peak of `n_bytes` and the reserve do not fit."""
    present = free()
    if n_bytes + RESERVE > present:
        raise TooLargeError(n_bytes, present)
