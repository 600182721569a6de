"""The launches that may spill more registers than `checks` allows, each with the reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import NamedTuple

from txl_kernels.backends.triton import CHECKED_TRITON_VERSIONS


class Spill(NamedTuple):
    """Accepted spills of launches on one architecture.

    Attributes:
        launch: names of launches, as a pattern of fnmatch.
        arch: such as 90 for sm_90.
        n_bytes: per thread, the most.
        why: the reason.
        versions: of Triton, those that spill as much.
    """

    launch: str
    arch: int
    n_bytes: int
    why: str
    versions: tuple[str, ...] = CHECKED_TRITON_VERSIONS


SPILLS: tuple[Spill, ...] = ()


def accepted(name: str, arch: int, version: str) -> int:
    """Bytes per thread that the table accepts for this launch; 0 if it has no entry."""
    fitting = (entry.n_bytes for entry in SPILLS if _applies(entry, name, arch, version))
    return max(fitting, default=0)


def unneeded(spilled: Mapping[tuple[str, int], tuple[int, int]], version: str) -> list[str]:
    """One sentence for each entry that no compiled launch needs.

    Args:
        spilled: by launch and architecture, all that were compiled: the spilled bytes per thread,
            and the limit without the table.
        version: of Triton.
    """
    arches = {arch for _, arch in spilled}
    return [
        f"the table of spills has an entry that no launch needs: {entry.launch} on sm_{entry.arch}"
        for entry in SPILLS
        if entry.arch in arches
        and version in entry.versions
        and not any(
            _applies(entry, name, arch, version) and n_bytes > limit
            for (name, arch), (n_bytes, limit) in spilled.items()
        )
    ]


def _applies(entry: Spill, name: str, arch: int, version: str) -> bool:
    same = entry.arch == arch and version in entry.versions
    return same and fnmatch.fnmatchcase(name, entry.launch)
