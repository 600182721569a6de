"""`transformer-xl evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transformer_xl import evaluation
from transformer_xl.checkpoint import check_tokenizer
from transformer_xl.cli.loading import LoadedModel, default_device
from transformer_xl.cli.options import (
    CacheDtype,
    Checkpoint,
    ClampLen,
    MemLen,
    Precision,
    SameLength,
    TgtLen,
    Weights,
)
from transformer_xl.cli.settings import only_overrides
from transformer_xl.config import EvaluateConfig
from transformer_xl.config_fields import section_from_dict
from transformer_xl.data import open_corpus
from transformer_xl.data.corpus import EVALUATE_FIELDS
from transformer_xl.evaluation import Lengths, Score


def evaluate(
    checkpoint: Checkpoint,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="Data to score, such as `data.path=…`; by default the checkpoint's.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        Literal["train", "valid", "test"] | None, typer.Option(show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Number of sequences per batch.", show_default=False)
    ] = None,
    tgt_len: TgtLen = None,
    mem_len: MemLen = None,
    clamp_len: ClampLen = None,
    same_length: SameLength = None,
    precision: Precision = None,
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
) -> None:
    """Compute bits per character or perplexity. The run's configuration has the defaults."""
    given = {
        "split": split,
        "batch_size": batch_size,
        "tgt_len": tgt_len,
        "mem_len": mem_len,
        "clamp_len": clamp_len,
        "same_length": same_length,
    }
    _refuse_options(arguments or [], (*given, "precision", "weights", "cache_dtype"))
    loaded = LoadedModel.open(
        checkpoint, default_device(), weights=weights, cache_dtype=cache_dtype
    )
    config = only_overrides(loaded.config, arguments or [])
    changes = {name: value for name, value in given.items() if value is not None}
    protocol = section_from_dict(
        EvaluateConfig, dataclasses.asdict(config.evaluate) | changes, "evaluate"
    )
    check_tokenizer(checkpoint, loaded.vocabulary, config.data.tokenizer)
    corpus = open_corpus(config.data, loaded.vocabulary)
    with loaded.autocast(precision, config.train.autocast):
        score = evaluation.score(
            loaded.model,
            corpus.batches(
                protocol.split, protocol.batch_size, protocol.tgt_len, fields=EVALUATE_FIELDS
            ),
            Lengths(protocol.mem_len, protocol.clamp_len, protocol.same_length),
            len(corpus.split(protocol.split)),
            max_steps=protocol.max_eval_steps,
            source=corpus.source(protocol.split),
            cache_dtype=loaded.cache_dtype,
        )
    show(Console(emoji=False), score, corpus.metric)


def _refuse_options(arguments: Sequence[str], options: Sequence[str]) -> None:
    """Raise ValueError for an option that is given as FIELD=VALUE without its section."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in options:
            option = f"--{name.replace('_', '-')}"
            given = f"{option} {value}"
            if value in ("true", "false"):
                given = option if value == "true" else option.replace("--", "--no-")
            raise ValueError(f"{argument}: this is an option of evaluate; write {given}")


def show(console: Console, score: Score, metric: str) -> None:
    """Print a score with its protocol; the corpus's metric is first."""
    table = Table(show_header=False, box=None, pad_edge=False)
    names = sorted(("bpc", "ppl"), key=lambda name: name != metric)
    for name in names:
        table.add_row(name, f"[bold]{getattr(score, name):.4f}[/]")
    table.add_row("loss", f"{score.loss:.4f} nats per token")
    table.add_row("tokens", f"{score.n_tokens:,} in {score.seconds:.1f} s")
    table.add_row("speed", f"{score.tokens_per_second:,.0f} tokens/s")
    table.add_row("protocol", escape(score.protocol))
    console.print(table)
