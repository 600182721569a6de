"""Runs `transformer-xl generate` on prompts, batch by batch, or on the paper's protocol."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from transformer_xl.cli.generate_output import (
    LARGE_BYTES,
    Quiet,
    Stream,
    print_json,
    print_memory,
    print_stats,
)
from transformer_xl.cli.generate_prompts import Prompt, token_ids
from transformer_xl.cli.generate_protocol import SAMPLING, Paper
from transformer_xl.cli.generate_texts import Settings, Stats, Text, View, write
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.config import DataConfig
from transformer_xl.data import Vocabulary
from transformer_xl.sampling import SEEDS
from transformer_xl.training.stopping import StopRequests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What is printed: `as_json`, texts at the end as JSON; `stats`, speeds and memory to stderr,
    in JSON with the texts."""

    as_json: bool
    stats: bool


def check(settings: Settings) -> None:
    """Raise ValueError for a number outside its range, or an empty stop string."""
    for name, value, least in (
        ("--length", settings.length, 0),
        ("--samples", settings.n_samples, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    if settings.seed not in SEEDS:
        raise ValueError(f"--seed: expected an integer in [-2^63, 2^64), got {settings.seed}")
    if "" in settings.stops:
        raise ValueError("--stop: expected a text, got an empty one")


def with_tokens(
    settings: Settings, vocabulary: Vocabulary, ban: Sequence[str], stop_token: Sequence[str]
) -> Settings:
    """The settings with banned tokens and stop tokens.

    Raises ValueError for one that is not in the vocabulary, and if no token is left to be drawn.
    """
    banned = token_ids(vocabulary, "--ban", ban)
    sampling = dataclasses.replace(settings.sampling, banned=banned)
    sampling.check(len(vocabulary))
    stop_tokens = token_ids(vocabulary, "--stop-token", stop_token)
    return dataclasses.replace(settings, sampling=sampling, stop_tokens=stop_tokens)


def run_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    settings: Settings,
    output: Output,
    batch_size: int,
) -> None:
    """Write the texts of all prompts, `batch_size` prompts at a time."""
    n = settings.n_samples
    titled = len(prompts) * n > 1
    is_quiet = output.as_json or settings.length == 0
    view: View = Quiet() if is_quiet else Stream(titled=titled, n_samples=n)
    texts: list[Text] = []
    stats = Stats()
    with StopRequests() as stops:
        for at in range(0, len(prompts), batch_size):
            batch = prompts[at : at + batch_size]
            texts += write(loaded, batch, settings, view, stats, stops, first=at * n)
            if stops.poll():
                break
        _finish(texts, loaded.vocabulary, settings, stats, output)
        stops.check()


def run_paper(loaded: LoadedModel, data: DataConfig, settings: Settings, output: Output) -> None:
    """Write the texts of the paper's protocol, and print them when all are at their end."""
    is_words = loaded.vocabulary.kind == "word"
    settings = dataclasses.replace(settings, sampling=SAMPLING, detokenized=is_words)
    paper = Paper.draw(loaded, data, settings)
    if not output.as_json:
        print(f"protocol: {paper.description}\n", flush=True)
    stats = Stats()
    with StopRequests() as stops:
        texts = write(loaded, paper.prompts, settings, Quiet(), stats, stops)
        if not output.as_json:
            for number, text in enumerate(texts):
                paper.print_text(number, text)
        _finish(texts, loaded.vocabulary, settings, stats, output, **paper.as_dict())
        stops.check()


def _finish(
    texts: Sequence[Text],
    vocabulary: Vocabulary,
    settings: Settings,
    stats: Stats,
    output: Output,
    **more: Any,
) -> None:
    """Print everything that follows the texts."""
    sys.stdout.flush()
    if output.as_json:
        print_json(texts, vocabulary, settings, stats if output.stats else None, **more)
    elif output.stats:
        print_stats(stats)
    elif stats.n_bytes > LARGE_BYTES:
        print_memory(stats)
