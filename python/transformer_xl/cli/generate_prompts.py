"""The prompts of `transformer-xl generate`, and the tokens that its options name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from transformer_xl.cli.documents import read_documents
from transformer_xl.data import Vocabulary
from transformer_xl.data.text import decode_whole
from transformer_xl.data.vocabularies import UnknownSymbolError

ID = "id:"  # begins a token that is given by its number


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue, with its name for messages, and its tokens."""

    name: str
    text: str
    ids: list[int]


def read_prompts(
    vocabulary: Vocabulary, texts: Sequence[str], files: Sequence[Path], *, lines: bool
) -> list[Prompt]:
    """The prompts in order: texts, then files or their lines; without any, one begins a new line.

    Prints the unknown symbols of a prompt that are read as `<unk>` to stderr.

    Raises:
        ValueError: a prompt without tokens, or with unknown symbols that the vocabulary has no
            `<unk>` for, or a file that is not UTF-8 text; the message has the name.
    """
    if not texts and not files:
        ids = vocabulary.first_tokens()
        return [Prompt("prompt", vocabulary.decode(ids), ids)]
    numbered = len(texts) > 1
    named = [(f"prompt {i}" if numbered else "prompt", t) for i, t in enumerate(texts, start=1)]
    if files:
        is_text = vocabulary.kind != "byte"
        documents = read_documents(files, lines, is_text)
        for name, data in documents:
            text = decode_whole(name, data, is_text=is_text)
            named.append((name, text.rstrip("\r\n") if lines else text))
        if len(named) == len(texts):
            raise ValueError("expected a prompt in the files, got none")
    prompts = [encoded(vocabulary, name, text) for name, text in named]
    for prompt in prompts:
        report_unknown(vocabulary, prompt)
    return prompts


def encoded(vocabulary: Vocabulary, name: str, text: str) -> Prompt:
    """A prompt with its tokens; ValueError if it has none, or unknown symbols without `<unk>`."""
    try:
        ids = vocabulary.encode(text)
    except UnknownSymbolError as error:
        raise ValueError(f"{name}: {error}") from error
    if not ids:
        raise ValueError(f"{name}: expected at least one token, got none")
    return Prompt(name, text, ids)


def report_unknown(vocabulary: Vocabulary, prompt: Prompt) -> None:
    """Print the symbols of a prompt that the vocabulary does not have to stderr."""
    if unknown := vocabulary.unknown(prompt.text):
        name = "the prompt" if prompt.name == "prompt" else prompt.name
        listed = ", ".join(unknown)
        message = f"unknown {vocabulary.symbol}s of {name}, read as <unk>: {listed}"
        print(message, file=sys.stderr)


def token_ids(vocabulary: Vocabulary, option: str, values: Sequence[str]) -> tuple[int, ...]:
    """The tokens that the values of an option name: by their text, or as `id:N`.

    Raises:
        ValueError: a number outside the vocabulary, an unknown symbol, or a text of several tokens.
    """
    return tuple(dict.fromkeys(_token_id(vocabulary, option, value) for value in values))


def _token_id(vocabulary: Vocabulary, option: str, value: str) -> int:
    number = value.removeprefix(ID)
    if value.startswith(ID) and number.isdecimal():
        if int(number) >= len(vocabulary):
            expected = f"a token from id:0 to id:{len(vocabulary) - 1}"
            raise ValueError(f"{option}: expected {expected}, got {value}")
        return int(number)
    special = {"<unk>": vocabulary.unknown_id, "<eos>": vocabulary.eos_id}.get(value)
    if special is not None:
        return special
    if unknown := vocabulary.unknown(value):
        raise ValueError(f"{option}: {vocabulary.symbol} {unknown[0]} is not in the vocabulary")
    ids = vocabulary.encode(value)
    if len(ids) != 1:
        raise ValueError(
            f"{option}: expected the text of one token, or id:N, got {value!r} with {len(ids)} "
            "tokens"
        )
    return ids[0]
