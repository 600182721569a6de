"""The results of a run of the benchmarks: one table for people, JSON for everything else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import result_file
from benchmarks.cases import OURS
from benchmarks.measure import Comparison
from benchmarks.step_profile import Share
from benchmarks.suite import Figures

NOTHING = "–"
NOT_QUIET = "~"

EXPLANATION = """\
Ratios are peer / ours, above 1 ours is faster: the median of the pairs' ratios [quartiles].
"~": the machine was not quiet. GFLOP/s are useful ones: 6·D per attended pair forward, 16·D
backward (with a position query 4·D + 2·d_rel and 10·D + 6·d_rel); three products per weight that
its tokens need in the adaptive softmax. "of limit" is their share of the best rate that products of
cached tiles reached just before, with the routine of these products. A yardstick has another
result: sdpa has no positions, no mask and no memory to join, sdpa-causal no positions; alone are
the documents of a packed row one by one; cache-500 is a cache without other keys; full is the
softmax over all V; one-table an embedding as wide for all tokens; reference is our own model
without the kernel. MiB: growth at the peak, ours / the smallest of the peers; for the adaptive
softmax without the returned gradients."""


def print_report(
    console: Console,
    machine: Mapping[str, object],
    results: Sequence[Figures],
    profile: Sequence[Share] = (),
) -> None:
    """The machine, the table, the reasons for missing figures, the parts of a training step."""
    console.print(_machine_line(machine), highlight=False)
    console.print(table(results))
    console.print(EXPLANATION, style="dim", highlight=False, markup=False)
    for note, places in _notes(results).items():
        console.print(f"{note} ({places})", style="yellow", highlight=False, markup=False)
    if profile:
        console.print(profile_table(profile))


def table(results: Sequence[Figures]) -> Table:
    """One row per case, a section per shape."""
    drawn = Table(title="Benchmarks", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("shape", "dtype", "pass"):
        drawn.add_column(column, no_wrap=True)
    for column in ("ours ms", "rate", "of limit", "yardstick", "fastest peer", "peak MiB"):
        drawn.add_column(column, justify="right")
    above = None
    for figures in results:
        _, shape, dtype, run = figures.case.split("/")
        if above not in (None, shape):
            drawn.add_section()
        drawn.add_row(
            "" if shape == above else shape,
            dtype,
            run,
            _milliseconds(figures),
            _rate(figures),
            _share(figures),
            *(_comparison(figures, name) for name in _beside(figures)),
            _memory(figures),
        )
        above = shape
    return drawn


def profile_table(profile: Sequence[Share]) -> Table:
    """The times of the parts of the model's training step."""
    drawn = Table(title="Our training step, float32", title_justify="left", box=box.SIMPLE_HEAD)
    drawn.add_column("part")
    drawn.add_column("ms", justify="right")
    drawn.add_column("share", justify="right")
    for part in profile:
        drawn.add_row(part.part, _figure(part.ms), f"{part.share:.1%}")
    return drawn


def write_json(
    path: Path,
    machine: Mapping[str, object],
    results: Sequence[Figures],
    profile: Sequence[Share] = (),
) -> list[dict[str, Any]]:
    """Writes everything that was measured (seconds, GFLOP/s, tokens/s, MiB) and returns all cases.

    Cases that an earlier run wrote into the file stay, unless they were measured again.
    """
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    cases = {case["case"]: case for case in earlier.get("cases", ())}
    for figures in results:
        record = dataclasses.asdict(figures)
        record["share_of_limit"] = figures.share_of_limit
        record["fastest_peer"] = figures.fastest_peer
        cases[figures.case] = record
    parts = [dataclasses.asdict(part) for part in profile] or earlier.get("training_step", [])
    document = {"machine": machine, "cases": list(cases.values()), "training_step": parts}
    result_file.write_json(path, document)
    return list(cases.values())


def _machine_line(machine: Mapping[str, object]) -> str:
    tiles = machine["tiles"]
    assert isinstance(tiles, Mapping)
    probed = ", ".join(f"{kind} {rate:.0f}" for kind, rate in tiles.items())
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; "
        f"native: {machine['native']}\n"
        f"GFLOP/s: torch.mm float32 {machine['matmul_float32']:.0f}, "
        f"bfloat16 {machine['matmul_bfloat16']:.0f}; "
        f"tiles: {probed or 'not probed, the native part is absent'}"
    )


def _beside(figures: Figures) -> tuple[str | None, str | None]:
    return next(iter(figures.yardsticks), None), figures.fastest_peer


def _comparison(figures: Figures, name: str | None) -> str:
    if name is None:
        return NOTHING
    found: Comparison = (figures.peers | figures.yardsticks)[name]
    ratio, mark = found.ratio, "" if found.quiet else NOT_QUIET
    return f"{name} {mark}[bold]{ratio.median:.2f}[/] \\[{ratio.q1:.2f}, {ratio.q3:.2f}]"


def _milliseconds(figures: Figures) -> str:
    if figures.seconds is None:
        return NOTHING
    return ("" if figures.quiet else NOT_QUIET) + _figure(figures.seconds.median * 1e3)


def _short(case: str) -> str:
    return case.removeprefix("rel_attention/").replace("/", " ")


def _notes(results: Sequence[Figures]) -> dict[str, str]:
    """Each note once, with where it holds."""
    places: dict[str, list[str]] = {}
    for figures in results:
        for contender, note in figures.notes.items():
            places.setdefault(note, []).append(f"{contender} in {_short(figures.case)}")
    return {
        note: found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"
        for note, found in places.items()
    }


def _rate(figures: Figures) -> str:
    if figures.gflops is not None:
        return f"{figures.gflops:.0f} GFLOP/s"
    if figures.gigabytes_per_second is not None:
        return f"{figures.gigabytes_per_second:.0f} GB/s"
    if figures.tokens_per_second is not None:
        return f"{figures.tokens_per_second:,.0f} tokens/s"
    return NOTHING


def _share(figures: Figures) -> str:
    if figures.share_of_limit is None or figures.limit is None:
        return NOTHING
    return f"{figures.share_of_limit:.0%} {figures.limit.kind.partition('_')[0]}"


def _memory(figures: Figures) -> str:
    """Ours and the smallest of the peers."""
    if OURS not in figures.peak_mib:
        return NOTHING
    peers = [mib for name, mib in figures.peak_mib.items() if name in figures.peers]
    least = f" / {min(peers):.0f}" if peers else ""
    return f"[bold]{figures.peak_mib[OURS]:.0f}[/]{least}"


def _figure(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
