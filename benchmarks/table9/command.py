"""`python -m benchmarks table9`: measure, print the table, write JSON and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import machine, registry, result_file
from benchmarks.cases.layer import LayerShape
from benchmarks.measure import SAMPLE_SECONDS, WANTED_ROUNDS, Probe, take_rounds
from benchmarks.table9 import contenders
from benchmarks.table9.costs import N_LAYERS, PAPER, Row, row
from benchmarks.table9.document import markdown
from benchmarks.table9.picture import plot
from transformer_xl.config import load_preset

PRESETS = ("enwik8_large", "enwik8_base")
CLAMP_LEN = 1000
RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(highlight=False, soft_wrap=True)
    probe, described = Probe(), machine.describe()
    slug = machine.Processor(str(described["processor"]), ()).slug
    written = options.out / f"table9-{slug}-{datetime.date.today().isoformat()}.json"
    rows: list[Row] = []
    notes: dict[str, str] = {}
    settings = [(preset, length) for preset in options.presets for length in options.lengths]
    for preset, length in track(settings, "timing", console=console):
        shape = registry.evaluated_layer(preset, mem_len=length, clamp_len=CLAMP_LEN)
        whole = load_preset(preset).model.n_layer
        rows += measure(preset, shape, whole, probe, options, notes)
        document = write_json(written, described, rows, notes)
    console.print(markdown(document, written.name), markup=False)
    plot(written)
    console.print(f"written: {written} and .png")


def measure(
    preset: str,
    shape: LayerShape,
    whole: int,
    probe: Probe,
    options: argparse.Namespace,
    notes: dict[str, str],
) -> list[Row]:
    """The rows of one attention length: one for each number of layers.

    Args:
        whole: layers of our whole model.
        options: `pairs` and `sample_seconds`.
        notes: receives why a contender is absent, by its name.

    Raises:
        WrongResultError: a contender has a wrong result.
    """
    contenders.check(shape, notes)
    with contenders.contenders(shape, whole, notes) as timed:
        rounds = take_rounds(
            list(timed.values()),
            probe,
            wanted=options.pairs,
            sample_seconds=options.sample_seconds,
        )
    return [row(preset, shape, n_layer, list(timed), rounds, whole) for n_layer in N_LAYERS]


def write_json(
    path: Path, described: Mapping[str, object], rows: Sequence[Row], notes: Mapping[str, str]
) -> dict[str, object]:
    """Write all rows until now, and return the document."""
    document = {
        "date": datetime.date.today().isoformat(),
        "machine": dict(described),
        "clamp_len": CLAMP_LEN,
        "tgt_len": registry.EVALUATED_TOKENS,
        "rows": [dataclasses.asdict(each) for each in rows],
        "notes": dict(notes),
    }
    result_file.write_json(path, document)
    return document


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks table9", description=__doc__)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(PAPER), help="attention lengths in tokens"
    )
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS, help="widths")
    parser.add_argument("--pairs", type=int, default=WANTED_ROUNDS, help="quiet rounds")
    parser.add_argument("--quick", action="store_true", help="one round of short samples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and picture")
    options = parser.parse_args(arguments)
    options.sample_seconds = SAMPLE_SECONDS
    if options.quick:
        options.pairs, options.sample_seconds = 1, 0.01
    if min(options.lengths) < 1:
        parser.error(f"--lengths: expected 1 or more tokens, got {min(options.lengths)}")
    return options
