"""The launches that may spill more registers than `checks` allows, each with the reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from typing import NamedTuple

from txl_kernels.backends.triton import CHECKED_TRITON_VERSIONS


class Spill(NamedTuple):
    """Accepted spills of launches on one architecture.

    Attributes:
        launch: names of launches, as a pattern of fnmatch.
        arch: such as 90 for sm_90.
        n_bytes: per thread, the most.
        why: the reason.
        versions: the versions of Triton that spill more than `checks` allows.
    """

    launch: str
    arch: int
    n_bytes: int
    why: str
    versions: tuple[str, ...] = CHECKED_TRITON_VERSIONS


SPILLS: tuple[Spill, ...] = ()


def find(launch: str, arch: int, version: str) -> Spill | None:
    """The first entry for this launch."""
    fitting = (
        entry
        for entry in SPILLS
        if entry.arch == arch
        and version in entry.versions
        and fnmatch.fnmatchcase(launch, entry.launch)
    )
    return next(fitting, None)


def unneeded(used: Collection[Spill], arches: Collection[int], version: str) -> list[str]:
    """One sentence for each entry that no launch needed in a complete run on `arches`."""
    return [
        f"no launch needs this entry of the table of spills: {entry.launch} on sm_{entry.arch}"
        for entry in SPILLS
        if entry.arch in arches and version in entry.versions and entry not in used
    ]
