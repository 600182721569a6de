"""`transformer-xl generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from transformer_xl import generation
from transformer_xl.cli.loading import LoadedModel, default_device
from transformer_xl.data import Vocabulary

WINDOW = 64  # tokens decoded again with each new one, for what joins them


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Text to go on from.", show_default=False)] = "\n",
    length: Annotated[int, typer.Option(help="Tokens to write.")] = 500,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens of this much mass.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed writes the same text.", show_default=False)
    ] = None,
    mem_len: Annotated[
        int | None, typer.Option(help="Tokens remembered; as trained if not given.")
    ] = None,
) -> None:
    """Write text, token by token as it is drawn."""
    loaded = LoadedModel.open(checkpoint, default_device())
    loaded.model.set_lengths(mem_len=mem_len)
    print(prompt, end="", flush=True)
    for piece in written(
        loaded,
        prompt,
        length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    ):
        print(piece, end="", flush=True)
    print()


def written(
    loaded: LoadedModel,
    prompt: str,
    length: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> Iterator[str]:
    """Pieces of the text that goes on from `prompt`, as soon as they are sure."""
    ids = loaded.vocabulary.encode(prompt)
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
    )
    return decoded(loaded.vocabulary, ids, (int(token) for token in tokens))


def decoded(vocabulary: Vocabulary, before: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text that each token adds; a character of several tokens comes with its last."""
    ids = before[-WINDOW:]
    shown = vocabulary.decode(ids)
    for token in tokens:
        ids.append(token)
        text = vocabulary.decode(ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(ids) < 2 * WINDOW:
            continue
        yield text[len(shown) :]
        ids = ids[-WINDOW:]
        shown = vocabulary.decode(ids)
