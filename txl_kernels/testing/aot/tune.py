"""Renews the table of launch configurations of `rel_attention`: offline, never in a user's call.

Candidates are compiled ahead of time, those that break a gate are dropped, the rest is ranked by
the static model; on a GPU the best of them are timed. `transformer-xl benchmark tune` runs this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch

from txl_kernels.errors import BackendUnavailableError
from txl_kernels.testing.aot import model, shipped_attention, speed
from txl_kernels.testing.aot.shipped import Call
from txl_kernels.testing.aot.shipped_attention import Attention
from txl_kernels.testing.aot.survey import survey


class Tuned(NamedTuple):
    """A table of `rel_attention_config`, the kernel it configures, and what makes a call its own:
    changes to a plain call, and the most queries."""

    table: str
    kernel: str
    changes: Mapping[str, Any] = MappingProxyType({})
    most_queries: int | None = None

    @property
    def part(self) -> str:
        return "forward" if self.kernel == _FWD else "backward"

    def of(self, attention: Attention) -> Attention:
        """The call that the table's rows are for, of these sizes."""
        Tq = min(attention.Tq, self.most_queries or attention.Tq)
        backward = attention.backward and Tq == attention.Tq
        return dataclasses.replace(attention, Tq=Tq, backward=backward, **self.changes)


_FWD, _DQDR = "_rel_attention_fwd_kernel", "_rel_attention_bwd_dqdr_kernel"
_DROPOUT: dict[str, Any] = {"options": {"dropout_p": 0.1}}
_MASK: dict[str, Any] = {"tensors": ("mask",), "causal": False}
TABLES = {
    "forward": Tuned("FORWARD", _FWD),
    "forward_burdened": Tuned("FORWARD_BURDENED", _FWD, _DROPOUT),
    "forward_overburdened": Tuned("FORWARD_OVERBURDENED", _FWD, {**_DROPOUT, **_MASK}),
    "forward_short": Tuned("FORWARD_SHORT", _FWD, most_queries=16),
    "dkdv": Tuned("BACKWARD_DKDV", "_rel_attention_bwd_dkdv_kernel"),
    "dqdr": Tuned("BACKWARD_DQDR", _DQDR),
    "dqdr_by_pair": Tuned("BACKWARD_DQDR_BY_PAIR", _DQDR, _DROPOUT),
}
NEEDED = (
    "FORWARD",
    "BACKWARD_DKDV",
    "BACKWARD_DQDR",
)  # that must have a row; others stand in front
BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3)
TIMED = 6  # of the candidates, the best by the model

Key = tuple[str, bool, int]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A configuration: the model's seconds, what gates it breaks, and where timed its ms."""

    config: Any
    seconds: float
    failures: tuple[str, ...]
    ms: float | None = None

    @property
    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        known = {"model_ms": self.seconds * 1e3, "ms": self.ms, "failures": self.failures}
        return {**self.config._asdict(), **known}


def key_of(attention: Attention, arch: int) -> Key:
    """Row of the tables for a call's head size and dtype on sm_`arch`."""
    from txl_kernels.backends.triton.rel_attention_config import block_size

    head_size = max(64, block_size(max(attention.D, attention.Dv or attention.D)))
    return (f"sm_{arch}", attention.dtype != torch.float32, head_size)


def row(table: str, attention: Attention, arch: int, best: Candidate | None) -> str:
    """The table's row as it stands in the source, or what keeps it from having one."""
    name = TABLES[table].table
    key = _key_text(key_of(attention, arch))
    if best is None:
        return f"{name}: no candidate for {key} holds its gates"
    return f"{name}: {key}: {_config_text(best)},"


def write(table: str, attention: Attention, arch: int, best: Candidate, path: Path) -> None:
    """Puts the candidate into its row of the tables' source, or behind the table's other rows. A
    comment of the row goes with what it was about.

    Raises:
        ValueError: the candidate breaks a gate, or the file holds no such table.
    """
    if best.failures:
        raise ValueError(f"tune: not written, it breaks a gate: {'; '.join(best.failures)}")
    name = TABLES[table].table
    key = re.escape(_key_text(key_of(attention, arch)))
    new = f"    {_key_text(key_of(attention, arch))}: {_config_text(best)},\n"
    source = path.read_text(encoding="utf-8")
    found = re.search(rf"^{name}: [^\n]* = {{\n(.*?)^}}\n", source, flags=re.M | re.S)
    if found is None:
        raise ValueError(f"tune: {path.name} holds no table {name}")
    rows, replaced = re.subn(rf"^ *{key}: [^\n]*\n", new, found[1], flags=re.M)
    rows = rows if replaced else rows + new
    path.write_text(source[: found.start(1)] + rows + source[found.end(1) :], encoding="utf-8")


def source() -> Path:
    """The file of the tables."""
    from txl_kernels.backends.triton import rel_attention_config

    return Path(rel_attention_config.__file__)


def configurations(table: str) -> list[Any]:
    """All that are tried. A kernel rotates rows no longer than there are columns of its tile."""
    from txl_kernels.backends.triton.rel_attention_config import Config

    found = []
    for block_q, block_k, warps, stages in itertools.product(BLOCKS, BLOCKS, WARPS, STAGES):
        rows, columns = (block_k, block_q) if table == "dkdv" else (block_q, block_k)
        if rows <= columns:
            found.append(Config(block_q, block_k, warps, stages))
    return found


def rank(
    table: str, attention: Attention, arch: int, configs: Iterable[Any] | None = None
) -> list[Candidate]:
    """The configurations by the model's time, those that break a gate last; sm_90 only is modelled
    as a processor, so another architecture's ranking is by the same clocks."""
    tuned = TABLES[table]
    key = key_of(attention, arch)
    call = shipped_attention.call("tune", tuned.of(attention), tuned.part)
    found = []
    for config in configurations(table) if configs is None else configs:
        with configured(tuned.table, key, config):
            try:
                candidate = _compiled(call, tuned.kernel, config, arch)
            except Exception as error:  # what the compiler cannot do is no candidate
                said = str(error).strip().partition("\n")[0]
                candidate = Candidate(config, float("inf"), (f"{type(error).__name__}: {said}",))
        found.append(candidate)
    return sorted(found, key=lambda each: (bool(each.failures), each.seconds))


def measure(table: str, attention: Attention, ranked: Iterable[Candidate]) -> list[Candidate]:
    """The best `TIMED` sound candidates with their milliseconds on this GPU, the fastest first.

    Raises:
        BackendUnavailableError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailableError("tune: no CUDA device: candidates are ranked, not timed")
    from triton.testing import do_bench

    major, _minor = torch.cuda.get_device_capability()
    key = key_of(attention, 90 if major == 9 else 80)
    tuned = TABLES[table]
    sound = [each for each in ranked if not each.failures][:TIMED]
    forward, backward = tuned.of(attention).passes_on("cuda")
    work = forward if tuned.part == "forward" else backward
    timed = []
    for each in sound:
        with configured(tuned.table, key, each.config):
            timed.append(dataclasses.replace(each, ms=float(do_bench(work, rep=200))))
    return sorted(timed, key=lambda each: each.ms or 0.0)


@contextlib.contextmanager
def configured(name: str, key: Key, config: Any) -> Iterator[None]:
    """Within it the table `name` has `config` in the row `key`, and each that needs one some row
    there."""
    from txl_kernels.backends.triton import rel_attention_config as tables

    with contextlib.ExitStack() as stack:
        for other in {*NEEDED, name}:
            table = getattr(tables, other)
            row = config if other == name else table.get(key, tables.Config(64, 64, 4, 2))
            stack.enter_context(mock.patch.dict(table, {key: row}))
        yield


def _key_text(key: Key) -> str:
    name, is_16_bit, head_size = key
    return f'("{name}", {is_16_bit}, {head_size})'


def _config_text(best: Candidate) -> str:
    return f"Config({', '.join(map(str, best.config))})"


def _compiled(call: Call, kernel: str, config: Any, arch: int) -> Candidate:
    only = dataclasses.replace(call, only=(kernel,))
    (found,) = survey([only], [arch])
    return Candidate(config, model.expected(found, speed.H100), found.failures)
