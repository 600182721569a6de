"""The launches that may spill more registers than `checks` allows, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from txl_kernels.backends.triton import CHECKED_TRITON_VERSIONS


class Spill(NamedTuple):
    """Accepted spills of launches.

    Attributes:
        launch: a regular expression for the names of the launches.
        arches: such as 90 for sm_90.
        n_bytes: per thread, the most.
        why: the reason.
        versions: the versions of Triton that spill more than `checks` allows.
    """

    launch: str
    arches: tuple[int, ...]
    n_bytes: int
    why: str
    versions: tuple[str, ...] = CHECKED_TRITON_VERSIONS


_ALL = (80, 86, 89, 90, 100, 120)
_F32, _BF16 = "rel_attention/float32/", "rel_attention/bfloat16/"
_DQDR = "/rel_attention_bwd_dqdr"
_FLAGS = "(parakeet_10min|wt103_base|no_memory|padding|clamp|chunk|softcap)"
_SMALLEST = "tiles of 16 x 16 are the smallest"
_HALF = "tiles of half as many queries spill less, but read k, v and r and add to dr twice as often"
_BEFORE = "the operands fill the registers before the loop, which spills none"

SPILLS = (
    Spill(_F32 + "head_256/rel_attention_fwd", (80, 90, 100), 1288, _BEFORE),
    Spill(_F32 + "head_256" + _DQDR, _ALL, 2304, _SMALLEST),
    Spill(_BF16 + "head_256" + _DQDR, (80, 86, 89, 100, 120), 680, _SMALLEST),
    Spill(_BF16 + _FLAGS + _DQDR, (90,), 896, _HALF),
)


def find(launch: str, arch: int, version: str) -> Spill | None:
    """The first entry for this launch."""
    for entry in SPILLS:
        is_of_target = arch in entry.arches and version in entry.versions
        if is_of_target and re.fullmatch(entry.launch, launch):
            return entry
    return None


def unneeded(
    used: Collection[tuple[Spill | None, int]], arches: Collection[int], version: str
) -> list[str]:
    """One sentence for each entry that is not `used` by a launch in a complete run on `arches`."""
    return [
        f"no launch needs this entry of the table of spills: {entry.launch} on sm_{arch}"
        for entry in SPILLS
        for arch in entry.arches
        if arch in arches and version in entry.versions and (entry, arch) not in used
    ]
