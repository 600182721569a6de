"""`transformer-xl benchmark`: renew the table of launch configurations of the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from transformer_xl.data.files import expanded, to_json
from txl_kernels import BackendUnavailableError
from txl_kernels.testing.aot import tune as tuning
from txl_kernels.testing.aot.shipped_attention import Attention
from txl_kernels.testing.aot.tune import Candidate

SHOWN = 12  # candidates to a table
TableName = Literal[
    "forward",
    "forward_burdened",
    "forward_overburdened",
    "forward_short",
    "dkdv",
    "dqdr",
    "dqdr_by_pair",
]

benchmark = typer.Typer(
    no_args_is_help=True,
    help="Renew the table of launch configurations. Figures: `make bench`, `make gpu`.",
)


@benchmark.callback()
def options() -> None:
    """Keeps `tune` a command of its own, though it is the only one."""


@benchmark.command()
def tune(
    table: Annotated[TableName, typer.Argument(help="Whose rows, as its source names them.")],
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option()] = "bfloat16",
    head_size: Annotated[int, typer.Option(help="The next power of 2 has the row.")] = 64,
    queries: Annotated[int, typer.Option(help="Of a segment; as many keys of memory.")] = 2048,
    model: Annotated[
        bool, typer.Option("--model", help="Rank by the static model; needs no GPU.")
    ] = False,
    arch: Annotated[Literal["80", "90"], typer.Option(help="With --model.")] = "90",
    write: Annotated[
        bool, typer.Option("--write", help="Put the row into rel_attention_config.py.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write all as JSON.", show_default=False)
    ] = None,
) -> None:
    """Compile candidates, drop those that break a gate, rank the rest, time the best on the GPU."""
    target = int(arch) if model else _architecture()
    attention = Attention(D=head_size, dtype=getattr(torch, dtype), Tq=queries, Tm=queries)
    found = tuning.rank(table, attention, target)
    by = "by the static model, nothing was measured"
    if not model:
        found, by = tuning.measure(table, attention, found), torch.cuda.get_device_name()
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(_drawn(f"{table}, {dtype}, D = {head_size}, sm_{target}", found))
    best = found[0] if found and not found[0].failures else None
    row = tuning.row(table, attention, target, best)
    console.print(f"Row for rel_attention_config.py, {by}:", row, sep="\n")
    if write and best is not None:
        tuning.write(table, attention, target, best, tuning.source())
        console.print(f"Written: {tuning.source()}", soft_wrap=True)
    if out is not None:
        document = {"by": by, "candidates": [each.record for each in found]}
        expanded(out).write_text(to_json(document, indent=1) + "\n", encoding="utf-8")


def _architecture() -> int:
    """That of the GPU here, as the table names it."""
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            "benchmark tune: no CUDA device here, so nothing can be timed; "
            "--model ranks the candidates by the static model instead"
        )
    return 90 if torch.cuda.get_device_capability()[0] == 9 else 80


def _drawn(title: str, found: Sequence[Candidate]) -> Table:
    drawn = Table("queries × keys", "warps", "stages", "model ms", "ms", "gates", title=title)
    for each in found[:SHOWN]:
        config = each.config
        drawn.add_row(
            f"{config.BLOCK_Q} × {config.BLOCK_K}",
            str(config.num_warps),
            str(config.num_stages),
            f"{each.seconds * 1e3:.3f}",
            "–" if each.ms is None else f"{each.ms:.3f}",
            "\n".join(each.failures) or "hold",
        )
    return drawn
