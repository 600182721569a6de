"""The texts that `transformer-xl generate` writes, each with its stop strings, token by token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from transformer_xl.cli.generate_prompts import Prompt
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.data import Vocabulary
from transformer_xl.detokenization import Detokenizer, detokenize
from transformer_xl.generation import FINISHED, draw, read_prompts
from transformer_xl.reader import Reader
from transformer_xl.sampling import RowGenerators, Sampling
from transformer_xl.streaming_text import StopStrings, TokenDecoder
from transformer_xl.training.stopping import Stopped, StopRequests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a text: how its tokens are drawn, and where it ends.

    Args:
        length: the most tokens of a text.
        sampling: how they are drawn.
        seed: of all texts; text i draws from (seed, i).
        n_samples: texts for each prompt.
        stops: a text ends before any of these strings.
        stop_tokens: a text ends before any of these tokens.
        detokenized: whether texts are shown without the spaces of WikiText's words.
    """

    length: int
    sampling: Sampling
    seed: int
    n_samples: int = 1
    stops: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    detokenized: bool = False


@dataclasses.dataclass
class Stats:
    """Sums over the texts of a command.

    `n_read` prompt tokens in `read_seconds`, `n_drawn` tokens of texts in `draw_seconds`,
    `n_bytes` of the largest memory.
    """

    n_read: int = 0
    read_seconds: float = 0.0
    n_drawn: int = 0
    draw_seconds: float = 0.0
    n_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The sums and the speeds for JSON."""
        speeds = {
            "read_tokens_per_second": self.n_read / max(self.read_seconds, 1e-9),
            "tokens_per_second": self.n_drawn / max(self.draw_seconds, 1e-9),
        }
        return dataclasses.asdict(self) | speeds


class Text:
    """One text: its tokens, and the part that can be shown.

    Attributes:
        prompt: the text before it. sample: its number among the texts of that prompt, from 0.
        pieces: the prompt, if it is shown, and the text so far, piece by piece.
        tokens, log_probs: all that were drawn, those of a stop string too.
        ending: "length", "stop", "stop_token" or "interrupted"; None: it is not at its end.
    """

    def __init__(
        self, vocabulary: Vocabulary, prompt: Prompt, settings: Settings, sample: int = 0
    ) -> None:
        self.prompt, self.sample = prompt, sample
        self._decoder = TokenDecoder(vocabulary, prompt.ids)
        self._stops = StopStrings(settings.stops)
        self._stop_tokens = settings.stop_tokens
        self._words = Detokenizer() if settings.detokenized else None
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.ending: str | None = None
        self._show(prompt.text)

    @property
    def shown_prompt(self) -> str:
        """The prompt as it is shown."""
        return _printable(self.prompt.text if self._words is None else detokenize(self.prompt.text))

    @property
    def text(self) -> str:
        """The text after the prompt."""
        return "".join(self.pieces)[len(self.shown_prompt) :]

    def feed(self, token: int, log_prob: float) -> None:
        """Add a token that was drawn."""
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if token in self._stop_tokens:
            self.close("stop_token")
            return
        self._show(self._stops.feed(self._decoder.feed(token)))
        if self._stops.reached is not None:
            self.close("stop")

    def close(self, ending: str) -> None:
        """Add the text that was held back; `ending` is ignored if the text is at its end."""
        if self.ending is None:
            last = self._stops.feed(self._decoder.end())
            self._show(last + self._stops.end())
            self.ending = ending if self._stops.reached is None else "stop"
            self._show("", last=True)

    def _show(self, piece: str, *, last: bool = False) -> None:
        if self._words is not None:
            piece = self._words.end() if last else self._words.feed(piece)
        if piece:
            self.pieces.append(_printable(piece))


def _printable(text: str) -> str:
    """The text with U+FFFD for bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class View(Protocol):
    """Prints texts, while they are written or afterwards."""

    def update(self, texts: Sequence[Text]) -> None:
        """Show the present state of the texts of a batch."""


def write(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    settings: Settings,
    view: View,
    stats: Stats,
    stops: StopRequests,
    *,
    first: int = 0,
) -> list[Text]:
    """Write the texts of one batch of prompts; after a request to stop, as far as they are.

    `first` is the number of the first of these texts among all.
    """
    texts = [
        Text(loaded.vocabulary, prompt, settings, sample)
        for prompt in prompts
        for sample in range(settings.n_samples)
    ]
    reader = loaded.reader(len(prompts))
    ids = [torch.tensor(prompt.ids, device=loaded.device) for prompt in prompts]
    view.update(texts)
    try:
        if settings.length > 0:
            with stops.at_once():
                hidden = timed_read(reader, ids, settings.n_samples, stats)
            continue_texts(reader, hidden, ids, texts, settings, view, stats, stops, first)
    except Stopped:
        pass  # the caller ends the command when it has shown the texts
    for text in texts:
        text.close("length" if len(text.tokens) == settings.length else "interrupted")
    view.update(texts)
    return texts


def timed_read(reader: Reader, ids: Sequence[Tensor], n_samples: int, stats: Stats) -> Tensor:
    """Read the prompts; hidden states [B, d_model] of the last token of each text."""
    started = time.perf_counter()
    hidden = read_prompts(reader, ids, n_samples)
    stats.n_read += sum(map(len, ids))
    stats.read_seconds += time.perf_counter() - started
    stats.n_bytes = max(stats.n_bytes, reader.n_bytes)
    return hidden


def continue_texts(
    reader: Reader,
    hidden: Tensor,
    ids: Sequence[Tensor],
    texts: Sequence[Text],
    settings: Settings,
    view: View,
    stats: Stats,
    stops: StopRequests,
    first: int,
) -> None:
    """Draw the tokens of the texts, and show each as soon as it is drawn, until a request to stop.

    `hidden` is of the tokens `ids` that the reader has read, once for each prompt.
    """
    random = RowGenerators(settings.seed, len(texts), first)
    seen = [prompt for prompt in ids for _ in range(len(texts) // len(ids))]

    def finished(tokens: Tensor) -> Tensor:
        return torch.tensor([text.ending is not None for text in texts])

    started = time.perf_counter()
    drawn = draw(reader, hidden, settings.length, settings.sampling, random, seen, (), finished)
    for tokens, log_probs in drawn:
        for text, token, log_prob in zip(texts, tokens.tolist(), log_probs.tolist(), strict=True):
            if token != FINISHED:
                text.feed(token, log_prob)
                stats.n_drawn += 1
        stats.draw_seconds += time.perf_counter() - started
        view.update(texts)
        if stops.poll():
            break
        started = time.perf_counter()
    stats.n_bytes = max(stats.n_bytes, reader.n_bytes)
