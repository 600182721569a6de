"""Compiles shipped calls, holds them to their gates, and notes what their inner loops cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from txl_kernels.testing.aot import gates, sass
from txl_kernels.testing.aot.build import Binary, build
from txl_kernels.testing.aot.record import Launch
from txl_kernels.testing.aot.shipped import ARCHITECTURES, Call, Kernel, launches

# The inner loops of all shipped launches by Triton's version and by name, renewed by `make model`.
TABLE = Path(__file__).resolve().parents[3] / "tests/txl_kernels/testing/aot/inner_loops.json"
GROWTH = 0.05  # of an inner loop that passes without the table being renewed
RENEW = "make model"
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Surveyed:
    """A kernel of a shipped call, compiled, its launches, and what of its gates does not hold."""

    name: str
    call: Call
    kernel: Kernel
    binary: Binary
    failures: tuple[str, ...]
    launches: tuple[Launch, ...]
    library_flop: int

    @property
    def row(self) -> dict[str, Any]:
        """What the table keeps of it."""
        loop = self.binary.code.main_loop()
        counts = sass.count(loop)
        telling = ("HGMMA", "HMMA", "LDS", "STS", "SHFL", "BAR", "MUFU")
        return {
            "loop": len(loop),
            "steady": len(sass.steady(loop)),
            **{name: counts[name] for name in telling if name in counts},
            "registers": self.binary.code.registers,
            "stack": self.binary.code.stack,
            "shared": self.binary.shared,
        }


def survey(calls: Iterable[Call], arches: Iterable[int] = ARCHITECTURES) -> Iterator[Surveyed]:
    """Each launch of each call, compiled for each architecture."""
    for call in calls:
        for arch in arches:
            for found in launches(call, arch):
                launch = found.launches[0]
                if call.only and launch.name not in call.only:
                    continue
                kernel = call.kernels[launch.name]
                binary = build(launch, arch)
                name = f"{found.name}/sm_{arch}"
                failed = tuple(gates.failures(name, binary, kernel.gate(launch, arch)))
                yield Surveyed(
                    name, call, kernel, binary, failed, found.launches, found.library_flop
                )


def triton_version() -> str:
    """Of the Triton that compiles here."""
    import triton

    return str(triton.__version__)


def read_table() -> dict[str, dict[str, Row]]:
    """The committed table: by Triton's version and by name. Empty where there is none."""
    if not TABLE.exists():
        return {}
    table: dict[str, dict[str, Row]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def write_table(version: str, rows: Mapping[str, Row]) -> None:
    """Puts the rows of one version of Triton in place of those in the table, a line each."""
    table = read_table() | {version: dict(rows)}
    parts = []
    for known in sorted(table):
        lines = (
            f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table[known].items())
        )
        parts.append(f" {json.dumps(known)}: {{\n" + ",\n".join(lines) + "\n }")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def growth_failure(found: Surveyed, table: Mapping[str, Row]) -> str | None:
    """One sentence where the inner loop has grown by more than `GROWTH`, or stands in no table."""
    known = table.get(found.name)
    if known is None:
        return f"its inner loop is not in {TABLE.name}: run `{RENEW}` and commit what it writes"
    before, now = known["loop"], found.row["loop"]
    if now > before * (1 + GROWTH):
        return (
            f"its inner loop has grown from {before} to {now} instructions; if it must, say why, "
            f"run `{RENEW}` and commit what it writes"
        )
    return None
