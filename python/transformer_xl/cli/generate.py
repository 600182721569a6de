"""`transformer-xl generate`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from transformer_xl import generation
from transformer_xl.cli.loading import LoadedModel, default_device
from transformer_xl.data import Vocabulary
from transformer_xl.data.vocabularies import UnknownSymbolError

WINDOW = 64  # tokens that are decoded again with each new one, whose text depends on them


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder of a checkpoint or of a run.", show_default=False)
    ],
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to continue; by default the end of a line.", show_default=False),
    ] = None,
    length: Annotated[int, typer.Option(help="Number of tokens to generate.")] = 500,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 selects the most probable token.")
    ] = 1.0,
    top_k: Annotated[
        int | None,
        typer.Option(help="Top-k sampling: keep the K most probable tokens.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Nucleus sampling: keep the smallest set of tokens whose cumulative probability "
            "is at least P.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed; the same seed gives the same text.", show_default=False),
    ] = None,
    mem_len: Annotated[
        int | None,
        typer.Option(
            help="Memory length in tokens; by default as in training.", show_default=False
        ),
    ] = None,
) -> None:
    """Generate text and print each token when it is drawn."""
    loaded = LoadedModel.open(checkpoint, default_device())
    loaded.model.set_lengths(mem_len=mem_len)
    vocabulary = loaded.vocabulary
    pieces = written(
        loaded,
        prompt,
        length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if prompt is None:
        prompt = vocabulary.decode(vocabulary.first_tokens())
    elif unknown := vocabulary.unknown(prompt):
        message = f"unknown {vocabulary.symbol}s of the prompt, read as <unk>: {', '.join(unknown)}"
        print(message, file=sys.stderr)
    for text in itertools.chain([prompt], pieces):
        print(text, end="", flush=True)
    print(flush=True)


def written(
    loaded: LoadedModel,
    prompt: str | None,
    length: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    cached: bool = True,
) -> Iterator[str]:
    """Yields the text after `prompt` in pieces, each when later tokens cannot change it.

    Without a prompt the text begins with the vocabulary's `first_tokens`. `cached` as for
    `generation.generate`.

    Raises ValueError for an invalid option or prompt before the first token is drawn.
    """
    vocabulary = loaded.vocabulary
    try:
        ids = vocabulary.first_tokens() if prompt is None else vocabulary.encode(prompt)
    except UnknownSymbolError as error:
        raise ValueError(f"prompt: {error}") from error
    if not ids:
        raise ValueError("prompt: expected at least one token, got none")
    tokens = generation.generate(
        loaded.model,
        torch.tensor([ids], device=loaded.device),
        length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        cached=cached,
    )
    return decoded(vocabulary, ids, (int(token) for token in tokens))


def decoded(vocabulary: Vocabulary, before: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text that each token adds. A character of several tokens is yielded with the last.

    An incomplete character at the end becomes U+FFFD.
    """
    ids = before[-WINDOW:]
    text = shown = vocabulary.decode(ids)
    for token in tokens:
        ids.append(token)
        text = vocabulary.decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(ids) < 2 * WINDOW:
            continue
        yield text[len(shown) :]
        ids = ids[-WINDOW:]
        text = shown = vocabulary.decode(ids)
    if text != shown:
        yield text[len(shown) :]
