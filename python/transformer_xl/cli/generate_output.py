"""How `transformer-xl generate` shows texts: as they are written, as JSON, with statistics."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from transformer_xl.cli.generate_texts import Settings, Stats, Text
from transformer_xl.data import Vocabulary

LARGE_BYTES = 1 << 30  # memories above it are always reported


class Stream:
    """Prints the texts of a batch in order, the first one that is not at its end as it is written.

    Args:
        titled: whether each text has a line with its name above it.
        n_samples: texts of each prompt, for the titles.
    """

    def __init__(self, *, titled: bool, n_samples: int) -> None:
        self._titled, self._n_samples = titled, n_samples
        self._text: Text | None = None  # the one that is being printed
        self._n_printed = 0  # pieces of it

    def update(self, texts: Sequence[Text]) -> None:
        """Print the pieces that are new."""
        at = next((i for i, text in enumerate(texts) if text is self._text), None)
        for text in texts[0 if at is None else at :]:
            if text is not self._text:
                self._begin(text)
            for piece in text.pieces[self._n_printed :]:
                print(piece, end="", flush=True)
            if text.ending is None:
                self._n_printed = len(text.pieces)
                return
            if self._n_printed <= len(text.pieces):
                print(flush=True)
            self._n_printed = len(text.pieces) + 1  # with the end of the line

    def _begin(self, text: Text) -> None:
        self._text, self._n_printed = text, 0
        if self._titled:
            sample = f", sample {text.sample + 1}" if self._n_samples > 1 else ""
            print(f"=== {text.prompt.name}{sample} ===")


class Quiet:
    """Prints nothing while texts are written."""

    def update(self, texts: Sequence[Text]) -> None:
        """Do nothing."""


def print_json(
    texts: Sequence[Text],
    vocabulary: Vocabulary,
    settings: Settings,
    stats: Stats | None,
    **more: Any,
) -> None:
    """Print one JSON object: seed, sampling, texts, and the statistics if there are any."""
    values = {
        **more,
        "seed": settings.seed,
        "length": settings.length,
        "sampling": dataclasses.asdict(settings.sampling),
        "texts": [as_dict(text, vocabulary) for text in texts],
    }
    if stats is not None:
        values["stats"] = stats.as_dict()
    print(json.dumps(values, ensure_ascii=False, allow_nan=False, indent=1))


def as_dict(text: Text, vocabulary: Vocabulary) -> dict[str, Any]:
    """A text for JSON."""
    scored = zip(text.tokens, text.log_probs, strict=True)
    return {
        "name": text.prompt.name,
        "sample": text.sample,
        "prompt": text.shown_prompt,
        "text": text.text,
        "ending": text.ending,
        "tokens": [
            {"text": vocabulary.decode([token]), "id": token, "logprob": log_prob}
            for token, log_prob in scored
        ],
    }


def print_stats(stats: Stats) -> None:
    """Print speeds and the size of the memory to stderr."""
    speeds = stats.as_dict()
    print(
        f"prompts: {stats.n_read:,} tokens in {stats.read_seconds:.2f} s, "
        f"{speeds['read_tokens_per_second']:,.1f} tokens/s\n"
        f"texts: {stats.n_drawn:,} tokens in {stats.draw_seconds:.2f} s, "
        f"{speeds['tokens_per_second']:,.1f} tokens/s",
        file=sys.stderr,
    )
    print_memory(stats)


def print_memory(stats: Stats) -> None:
    """Print the size of the memory to stderr."""
    print(f"memory: {stats.n_bytes / (1 << 20):,.1f} MiB", file=sys.stderr)
