"""Launch configurations of the `rel_attention` kernels: a table, nothing measured at run time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from txl_kernels.backends.triton import interprets
from txl_kernels.backends.triton.launching import real_device


class Config(NamedTuple):
    """A tile of queries and keys, and the warps and pipeline stages of a program."""

    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """As keyword arguments of a launch."""
        return self._asdict()


INTERPRETED = Config(16, 16, 4, 1)
# By architecture, whether inputs have 16 bits, and the head size rounded up to 64, 128 or 256.
# Chosen by registers, spills, shared memory and instructions of the compiled loop, not by timing;
# so the number of keys, which is how often the loop runs, has no rows of its own.
FORWARD: dict[tuple[str, bool, int], Config] = {
    ("sm_90", True, 64): Config(64, 64, 4, 2),
    ("sm_90", True, 128): Config(64, 64, 4, 2),
    ("sm_90", True, 256): Config(32, 64, 8, 2),
    ("sm_90", False, 64): Config(16, 16, 4, 2),
    ("sm_90", False, 128): Config(16, 16, 8, 2),
    ("sm_90", False, 256): Config(16, 16, 8, 2),
    ("sm_80", True, 64): Config(64, 64, 4, 2),
    ("sm_80", True, 128): Config(64, 64, 8, 2),
    ("sm_80", True, 256): Config(32, 64, 8, 2),
    ("sm_80", False, 64): Config(16, 16, 4, 2),
    ("sm_80", False, 128): Config(16, 16, 8, 2),
    ("sm_80", False, 256): Config(16, 16, 8, 2),
}
# What differs where registers are wanted for each pair or load: with one, or with more, of dropout,
# a dense mask, and rows that are no multiple of 16 elements.
FORWARD_BURDENED: dict[tuple[str, bool, int], Config] = {
    ("sm_90", True, 64): Config(64, 64, 8, 2),
    ("sm_90", True, 128): Config(32, 64, 8, 2),
    ("sm_80", True, 64): Config(32, 64, 8, 2),
    ("sm_80", True, 128): Config(32, 64, 8, 2),
}
FORWARD_OVERBURDENED: dict[tuple[str, bool, int], Config] = {
    **FORWARD_BURDENED,
    ("sm_90", True, 64): Config(32, 64, 8, 2),
}
# What differs for up to SHORT queries.
SHORT = 16
FORWARD_SHORT: dict[tuple[str, bool, int], Config] = {
    ("sm_90", True, 64): Config(16, 64, 4, 3),
    ("sm_90", True, 128): Config(16, 64, 4, 2),
    ("sm_90", True, 256): Config(16, 32, 4, 2),
    ("sm_80", True, 64): Config(16, 64, 4, 3),
    ("sm_80", True, 128): Config(16, 64, 4, 2),
    ("sm_80", True, 256): Config(16, 32, 4, 2),
}

# The backward kernels hold tiles [keys, queries]: one of 64 or more keys feeds HGMMA; few queries
# leave registers for the accumulators, many load k, v and r and add to dr for more pairs each.
BACKWARD_DKDV: dict[tuple[str, bool, int], Config] = {
    ("sm_90", True, 64): Config(64, 128, 8, 2),
    ("sm_90", True, 128): Config(64, 64, 4, 2),
    ("sm_90", True, 256): Config(16, 32, 8, 2),
    ("sm_90", False, 64): Config(16, 16, 4, 2),
    ("sm_90", False, 128): Config(16, 16, 8, 2),
    ("sm_90", False, 256): Config(16, 16, 8, 2),
    ("sm_80", True, 64): Config(32, 128, 8, 2),
    ("sm_80", True, 128): Config(32, 32, 4, 2),
    ("sm_80", True, 256): Config(16, 16, 8, 2),
    ("sm_80", False, 64): Config(16, 16, 4, 2),
    ("sm_80", False, 128): Config(16, 16, 8, 2),
    ("sm_80", False, 256): Config(16, 16, 8, 2),
}
BACKWARD_DQDR: dict[tuple[str, bool, int], Config] = {
    ("sm_90", True, 64): Config(64, 64, 4, 2),
    ("sm_90", True, 128): Config(32, 64, 4, 2),
    ("sm_90", True, 256): Config(16, 16, 8, 2),
    ("sm_90", False, 64): Config(16, 16, 4, 2),
    ("sm_90", False, 128): Config(16, 16, 8, 2),
    ("sm_90", False, 256): Config(16, 16, 8, 2),
    ("sm_80", True, 64): Config(32, 32, 4, 2),
    ("sm_80", True, 128): Config(32, 32, 8, 2),
    # With two stages Triton 3.7.1 ends at 32 registers and 2 KiB spilled.
    ("sm_80", True, 256): Config(16, 16, 8, 1),
    ("sm_80", False, 64): Config(16, 16, 4, 2),
    ("sm_80", False, 128): Config(16, 16, 8, 2),
    ("sm_80", False, 256): Config(16, 16, 8, 2),
}
# What differs with dropout or a dense mask.
BACKWARD_DQDR_BY_PAIR: dict[tuple[str, bool, int], Config] = {
    ("sm_90", True, 64): Config(16, 64, 4, 2),
}


def forward_config(
    arch: str, D: int, Dv: int, dtype: torch.dtype, Tq: int, has_mask: bool, has_dropout: bool
) -> Config:
    """The tables' row for a call."""
    if arch == "interpreter":
        return INTERPRETED
    key = (arch, dtype != torch.float32, max(64, block_size(max(D, Dv))))
    burdens = has_mask + has_dropout + (D % 16 > 0 or Dv % 16 > 0)
    if Tq <= SHORT and key in FORWARD_SHORT:
        return FORWARD_SHORT[key]
    table = (FORWARD, FORWARD_BURDENED, FORWARD_OVERBURDENED)[min(burdens, 2)]
    return table.get(key) or FORWARD[key]


def dkdv_config(arch: str, D: int, Dv: int, dtype: torch.dtype) -> Config:
    """For the backward kernel that owns keys."""
    if arch == "interpreter":
        return INTERPRETED
    return BACKWARD_DKDV[arch, dtype != torch.float32, max(64, block_size(max(D, Dv)))]


def dqdr_config(arch: str, D: int, Dv: int, dtype: torch.dtype, by_pair: bool) -> Config:
    """For the backward kernel that owns queries; `by_pair` is as for the forward's."""
    if arch == "interpreter":
        return INTERPRETED
    key = (arch, dtype != torch.float32, max(64, block_size(max(D, Dv))))
    config = BACKWARD_DQDR_BY_PAIR.get(key) if by_pair else None
    return config or BACKWARD_DQDR[key]


def architecture(device: torch.device) -> str:
    """ "interpreter", "sm_80" or "sm_90": the row of the table for a device."""
    if interprets():
        return "interpreter"
    major, _minor = torch.cuda.get_device_capability(real_device(device))
    return "sm_90" if major == 9 else "sm_80"


def block_size(head_size: int) -> int:
    """Columns of a tile that holds one head: a power of 2, at least a tensor core's 16."""
    return max(16, 1 << (head_size - 1).bit_length())
