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


_FLOAT32, _16_BITS = "rel_attention/float32/", "rel_attention/b?float16/"
_DQDR = "/rel_attention_bwd_dqdr"
_SMALLEST = "tiles of 16 x 16 are the smallest"
_HALF = "tiles of half as many queries spill less, but read k, v and r and add to dr twice as often"
_HEAD_256 = "(head_256|dropout_d256|head_192_values_40)"
_CHUNK = "the divisions for chunk borders need registers; calls without chunks use this row too"
_NUMBERS = "the random numbers of a tile fill the registers; 8 warps multiply almost all twice"

SPILLS = (
    Spill(_FLOAT32 + "head_256" + _DQDR, (80, 86, 89, 90, 100, 120), 2304, _SMALLEST),
    Spill(_16_BITS + "dropout_d256" + _DQDR, (80,), 2088, _SMALLEST),
    Spill(_16_BITS + _HEAD_256 + _DQDR, (80, 86, 89, 120), 824, _SMALLEST),
    Spill(_16_BITS + "chunk" + _DQDR, (90,), 1128, _CHUNK + "; " + _HALF, ("3.9.0",)),
    Spill(_16_BITS + ".*" + _DQDR, (90,), 1000, _HALF),
    Spill(_16_BITS + "inkling_sliding" + _DQDR, (86, 89, 120), 632, _HALF),
    Spill(_16_BITS + "chunk/rel_attention_fwd", (100,), 64, _CHUNK, ("3.9.0",)),
    Spill(_16_BITS + "dropout_d128" + _DQDR, (86, 89), 520, _NUMBERS, ("3.6.0",)),
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
