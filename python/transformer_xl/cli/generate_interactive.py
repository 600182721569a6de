"""`transformer-xl generate --interactive`: a text that the user and the model write in turn."""

from __future__ import annotations

import dataclasses
import signal
import sys

import torch
from torch import Tensor

from transformer_xl.cli.generate_output import Stream, print_stats
from transformer_xl.cli.generate_prompts import Prompt, encoded, report_unknown
from transformer_xl.cli.generate_texts import Settings, Stats, Text, continue_texts, timed_read
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.data import Vocabulary
from transformer_xl.training.stopping import Stopped, StopRequests

MARK = "> "


def converse(loaded: LoadedModel, settings: Settings, *, with_stats: bool) -> None:
    """Read a line, continue it, and so on, until the end of the input.

    Ctrl-C while a text is written ends that text; otherwise it ends the command. An error in a
    line is printed, and the next line is read.
    """
    conversation = Conversation(loaded, settings)
    while (line := _line()) is not None:
        try:
            stats = conversation.turn(line)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        if with_stats:
            print_stats(stats)


class Conversation:
    """A text that grows with each turn; all of it stays in the memory.

    Attributes:
        tokens: of the user and of the model, those of a stop string too.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        self._loaded, self._settings = loaded, settings
        self._reader = loaded.reader(1)
        self._hidden: Tensor | None = None  # [1, d_model], of the last token that was read
        self._n_read = self._n_turns = 0
        self.tokens: list[int] = []

    def turn(self, line: str) -> Stats:
        """Read a line and print its continuation.

        The line begins after the end of a line, or after a space if the vocabulary has no ends of
        lines. An empty one continues the text as it is. With length 0 nothing is read or printed.

        Raises:
            ValueError: unknown symbols that the vocabulary has no `<unk>` for; nothing is read.
            Stopped: SIGTERM or SIGHUP arrived; the text so far is printed first.
        """
        prompt = _prompt(self._loaded.vocabulary, line, is_first=not self.tokens)
        self.tokens += prompt.ids
        stats, settings = Stats(), self._settings
        if settings.length == 0:
            return stats
        hidden = self._read(stats)
        shown = dataclasses.replace(prompt, text="", ids=self.tokens)
        text = Text(self._loaded.vocabulary, shown, settings)
        view = Stream(titled=False, n_samples=1)
        seen = [torch.tensor(self.tokens, device=self._loaded.device)]
        with StopRequests() as stops:
            continue_texts(
                self._reader, hidden, seen, [text], settings, view, stats, stops, self._n_turns
            )
        text.close("length" if len(text.tokens) == settings.length else "interrupted")
        view.update([text])
        self._n_turns += 1
        self.tokens += text.tokens
        self._n_read = len(self.tokens) - bool(text.tokens)  # the last one has not been read
        if stops.received not in (None, signal.SIGINT):
            raise Stopped(stops.received)
        return stats

    def _read(self, stats: Stats) -> Tensor:
        """Read the tokens that have not been read; the hidden state of the last token."""
        if unread := self.tokens[self._n_read :]:
            ids = torch.tensor(unread, device=self._loaded.device)
            self._hidden = timed_read(self._reader, [ids], 1, stats)
            self._n_read = len(self.tokens)
        assert self._hidden is not None
        return self._hidden


def _line() -> str | None:
    """The next line that the user types, without its end; None at the end of the input."""
    try:
        return input(MARK if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _prompt(vocabulary: Vocabulary, line: str, *, is_first: bool) -> Prompt:
    """The line with the tokens that are read for it, those between the text and it too."""
    between = vocabulary.first_tokens()
    if not line:
        return Prompt("prompt", "", between if is_first else [])
    prompt = encoded(vocabulary, "prompt", line)
    report_unknown(vocabulary, prompt)
    if is_first or vocabulary.decode(between).strip():
        return prompt
    return dataclasses.replace(prompt, ids=between + prompt.ids)
