"""Launch configurations of the Triton kernels: the rows of `launch_table.json`, by class of device.

Rows are chosen from compiled code (registers, spills, shared memory), never while a call runs.
A row has a kernel, a class, a variant and, where the kernel's rows depend on them, the bits of the
inputs' dtype (16 or 32) and the head size rounded up to 64, 128 or 256.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from txl_kernels.backends.triton import interprets
from txl_kernels.backends.triton.launching import real_device

PATH = Path(__file__).with_name("launch_table.json")
# Shared memory per block that the rows of the class "163KiB" may use: the limit of sm_80.
_LARGE_SHARED_MEMORY = 163 * 1024


class AttentionConfig(NamedTuple):
    """A tile of queries and keys, and the warps and pipeline stages of a program."""

    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """The keyword arguments of a launch."""
        return self._asdict()


class ProductConfig(NamedTuple):
    """Tokens, columns and inner width of a tile of `adaptive_products`."""

    BLOCK_ROWS: int
    BLOCK_OUT: int
    BLOCK_IN: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """The keyword arguments of a launch."""
        return self._asdict()


class TailConfig(NamedTuple):
    """A tile of tokens and columns, and how many elements of each row it holds."""

    BLOCK_ROWS: int
    BLOCK_V: int
    MAX_WIDTH: int  # rows up to this wide are held whole, wider ones in pieces of BLOCK_WIDTH
    BLOCK_WIDTH: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """The keyword arguments of a launch."""
        return self._asdict()


class SplitConfig(NamedTuple):
    """Rows of partial results in addition to one per token, and the fewest columns of each."""

    N_PARTIALS: int
    MIN_COLUMNS: int


class HeadConfig(NamedTuple):
    """Columns of a tile of the kernels that read one row of the head's logits."""

    BLOCK_V: int
    num_warps: int
    num_stages: int


Config = AttentionConfig | ProductConfig | TailConfig | SplitConfig | HeadConfig
_Config = TypeVar("_Config", bound=Config)

# The kernels, or groups of kernels, that have rows.
KERNELS: dict[str, type[Config]] = {
    "rel_attention_fwd": AttentionConfig,
    "rel_attention_bwd_dkdv": AttentionConfig,
    "rel_attention_bwd_dqdr": AttentionConfig,
    "adaptive_products": ProductConfig,
    "adaptive_tails_fwd": TailConfig,
    "adaptive_tails_dx": TailConfig,
    "adaptive_tails_dweight": TailConfig,
    "adaptive_tails_fwd_splits": SplitConfig,
    "adaptive_tails_dx_splits": SplitConfig,
    "adaptive_head": HeadConfig,
}


class Key(NamedTuple):
    """Identifies a row. A value of None is absent in the row: the row holds for every value."""

    kernel: str
    launch_class: str
    variant: str
    bits: int | None = None
    head_size: int | None = None


# Where a row has the parts of a key.
_FIELDS = dict(zip(Key._fields, ("kernel", "class", "variant", "bits", "head_size"), strict=True))


def device_limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """The compute capability, and the bytes of shared memory that one block can use at most."""
    properties: Any = torch.cuda.get_device_properties(real_device(device))
    capability = (properties.major, properties.minor)
    return capability, properties.shared_memory_per_block_optin


def launch_class(device: torch.device) -> str:
    """The class whose rows the kernels use on this device.

    Returns:
        "interpreter", "sm_90" (capability 9.x), "163KiB" (any other device that allows a block
        as much shared memory, such as sm_80 and sm_100) or "99KiB" (all others, such as sm_86,
        sm_89 and sm_120).
    """
    if interprets():
        return "interpreter"
    (major, _minor), shared = device_limits(device)
    if major == 9:
        return "sm_90"
    return "163KiB" if shared >= _LARGE_SHARED_MEMORY else "99KiB"


def find(
    config: type[_Config],
    kernel: str,
    device: torch.device,
    *,
    variants: Sequence[str] = (),
    bits: int | None = None,
    head_size: int | None = None,
) -> _Config:
    """The row of a kernel for a device: of the first variant that has one, else of "plain".

    Raises:
        LookupError: the table has no such row.
    """
    row_class = launch_class(device)
    if row_class == "interpreter":
        variants, bits, head_size = (), None, None
    for variant in (*variants, "plain"):
        found = rows().get(Key(kernel, row_class, variant, bits, head_size))
        if isinstance(found, config):
            return found
    raise LookupError(
        f"{PATH.name} has no row for kernel {kernel}, class {row_class}, variant plain, "
        f"bits {bits}, head_size {head_size}"
    )


@functools.cache
def rows() -> dict[Key, Config]:
    """All rows of the table. Read once per process."""
    return read(PATH)


def read(path: Path) -> dict[Key, Config]:
    """The rows of a table.

    Raises:
        ValueError: two rows have the same key, or a row's kernel or fields are unknown.
    """
    found: dict[Key, Config] = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        key, config = _parse(row, path.name)
        if key in found:
            raise ValueError(f"{path.name}: two rows for {key}")
        found[key] = config
    return found


def replace_rows(path: Path, new_rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the rows that have the same keys as the new ones. All other lines stay the same.

    A row with a new key is written after the last row of its kernel. The file is replaced at
    once: a reader sees the old or the new table.

    Args:
        path: the table.
        new_rows: each with the fields of a row of the table; "why" is optional.

    Raises:
        ValueError: two new rows have the same key, or a row's kernel or fields are unknown.
    """
    given = list(new_rows)
    pending = {_parse(row, path.name)[0]: json.dumps(dict(row)) for row in given}
    if len(pending) < len(given):
        raise ValueError(f"{path.name}: two of the new rows have the same key")
    lines = [line.rstrip(",") for line in path.read_text(encoding="utf-8").splitlines()[1:-1]]
    keys = [_parse(json.loads(line), path.name)[0] for line in lines]
    lines = [pending.pop(key, line) for key, line in zip(keys, lines, strict=True)]
    for key, line in pending.items():
        after = max((n for n, other in enumerate(keys) if other.kernel == key.kernel), default=-1)
        after = after if after >= 0 else len(lines) - 1
        lines.insert(after + 1, line)
        keys.insert(after + 1, key)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    temporary.replace(path)


def _parse(row: Mapping[str, Any], name: str) -> tuple[Key, Config]:
    """The key and the configuration of one row."""
    config = KERNELS.get(row.get("kernel", ""))
    if config is None:
        raise ValueError(f"{name}: unknown kernel in {dict(row)}")
    values = {field: row[field] for field in row if field not in (*_FIELDS.values(), "why")}
    if set(values) != set(config._fields) or not {"class", "variant"} <= set(row):
        raise ValueError(f"{name}: fields other than {config._fields} in {dict(row)}")
    key: dict[str, Any] = {name: row.get(field) for name, field in _FIELDS.items()}
    return Key(**key), config(**values)
