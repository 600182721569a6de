"""`transformer-xl score`."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from transformer_xl import scoring
from transformer_xl.cli import score_views
from transformer_xl.cli.documents import read_documents
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
from transformer_xl.config import EvaluateConfig
from transformer_xl.config_fields import section_from_dict
from transformer_xl.evaluation import Lengths
from transformer_xl.scoring import Totals


def score(
    checkpoint: Checkpoint,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Texts, each a document; by default stdin.", show_default=False),
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line is a document.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    color: Annotated[
        bool, typer.Option("--color", help="Print the text, coloured by surprise.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the coloured text to this file, too.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Lines that are scored side by side.")] = 16,
    tgt_len: TgtLen = None,
    mem_len: MemLen = None,
    clamp_len: ClampLen = None,
    same_length: SameLength = None,
    precision: Precision = None,
    weights: Weights = None,
    cache_dtype: CacheDtype = None,
) -> None:
    """Print the log-probability of every token of a text, in nats.

    The model reads each document from its start, with an empty memory.
    By default the lengths are those of the run's evaluation.
    """
    if as_json and color:
        raise ValueError("expected one of --json and --color, got both")
    if batch_size < 1:
        raise ValueError(f"--batch-size: expected 1 or more, got {batch_size}")
    loaded = LoadedModel.open(
        checkpoint, default_device(), weights=weights, cache_dtype=cache_dtype
    )
    given = {"tgt_len": tgt_len, "mem_len": mem_len, "clamp_len": clamp_len}
    changes = {k: v for k, v in {**given, "same_length": same_length}.items() if v is not None}
    run = section_from_dict(
        EvaluateConfig, dataclasses.asdict(loaded.config.evaluate) | changes, "evaluate"
    )
    lengths = Lengths(run.mem_len, run.clamp_len, run.same_length)
    is_text = loaded.vocabulary.kind != "byte"
    documents = read_documents(files or [], lines, is_text)
    with contextlib.ExitStack() as stack:
        stack.enter_context(loaded.autocast(precision, loaded.config.train.autocast))
        language_model = (loaded.model, loaded.vocabulary)
        options: dict[str, Any] = {"tgt_len": run.tgt_len, "cache_dtype": loaded.cache_dtype}
        protocol = scoring.protocol(*language_model, lengths, **options)
        views = [_view(protocol, as_json=as_json, color=color)]
        if html is not None:
            file = stack.enter_context(score_views.replacing(html))
            views.append(score_views.Html(file, protocol))
        totals = Totals()
        while batch := list(islice(documents, batch_size if lines else 1)):
            for document in scoring.score_documents(*language_model, batch, lengths, **options):
                totals = totals.plus(document)
                for view in views:
                    view.add(document)
        if totals.n_documents == 0:
            raise ValueError("expected a text, got none")
        for view in views:
            view.end(totals)


def _view(protocol: str, *, as_json: bool, color: bool) -> score_views.View:
    if as_json:
        return score_views.Json(sys.stdout, protocol)
    return score_views.Colored(protocol) if color else score_views.Lines(sys.stdout, protocol)
