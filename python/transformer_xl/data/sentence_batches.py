"""Batches of independent sentences (One Billion Word) in parallel streams, in a random order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from transformer_xl.data.batches import (
    Batch,
    TooShortError,
    check_range,
    check_sizes,
    check_state,
)
from transformer_xl.data.files import is_int
from transformer_xl.data.token_file import TokenArray
from transformer_xl.messages import shortened

SCAN_TOKENS = 1 << 24


class ShuffledSentenceBatches:
    """Segments of concatenated sentences `<S> … <S>`; a row gets another one when needed.

    The rows of the whole batch get the sentences in one order. So all processes assign them alike,
    and each process reads its own rows. The second `<S>` between two sentences is never a target.
    As in the original, memory is kept from one sentence to the next and is reset only at the first
    batch of a pass.

    Args:
        tokens: token ids of sentences, each between two `boundary` tokens.
        boundary: the id of `<S>`.
        batch_size, tgt_len, rows, loop: as for `OrderedBatches`.
        seed: seed of the order; pass e uses (seed, e). None keeps the order of the file.
        partial: treatment of the last batch, in which sentences are missing for some rows: "drop"
            omits it, as the original does; "pad" fills it with targets -100, so that every token
            is scored once.

    Raises:
        ValueError: as `OrderedBatches`, or the tokens are not such sentences.
        TooShortError: there are too few sentences for one batch and `partial` is "drop".

    Memory: two int64 per sentence (30 M sentences: 480 MB).
    Source: the original's LMShuffledIterator.
    """

    def __init__(
        self,
        tokens: TokenArray,
        boundary: int,
        batch_size: int,
        tgt_len: int,
        *,
        seed: int | None,
        rows: tuple[int, int] | None = None,
        loop: bool = False,
        partial: Literal["drop", "pad"] = "drop",
    ) -> None:
        self.rows = check_sizes(batch_size, tgt_len, rows)
        self.batch_size, self.tgt_len, self.loop = batch_size, tgt_len, loop
        self.seed, self.partial = seed, partial
        self._tokens = tokens
        self._edges = sentence_edges(tokens, boundary)  # [n_sentences + 1]
        self._start_pass(0)
        if self._next_batch() is None:
            raise TooShortError(
                f"tokens: {self.n_sentences:,} sentences, {self.n_tokens:,} targets, do not fill "
                f"one batch ({batch_size} rows of tgt_len {tgt_len})"
            )
        self._start_pass(0)

    @property
    def n_sentences(self) -> int:
        """Number of sentences in one pass, in all rows."""
        return len(self._edges) - 1

    @property
    def n_tokens(self) -> int:
        """Number of targets of all sentences; "drop" omits some at the end of a pass."""
        return len(self._tokens) - self.n_sentences

    def _start_pass(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = self._ordered(epoch)
        self._dealt = 0  # sentences assigned to rows
        self._batch = 0  # batches read
        # Per row, the unread tokens [position, end) of its sentence.
        self._spans = [(0, 0)] * self.batch_size

    def _ordered(self, epoch: int) -> NDArray[np.int64]:
        if self.seed is None:
            return np.arange(self.n_sentences)
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_sentences)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            while (batch := self._next_batch()) is not None:
                yield batch
            self._start_pass(self._epoch + 1)
            if not self.loop:
                return

    def _next_batch(self) -> Batch | None:
        """The next batch of these rows; None at the end of the pass."""
        start, stop = self.rows
        tokens = np.zeros((stop - start, self.tgt_len), dtype=np.int64)
        targets = np.full_like(tokens, -100)
        n_filled = 0
        for row in range(self.batch_size):
            filled = 0
            for first, last in self._take(row):  # last: index of the last target
                length = last - first
                if start <= row < stop:
                    into = (row - start, slice(filled, filled + length))
                    tokens[into] = self._tokens[first:last]
                    targets[into] = self._tokens[first + 1 : last + 1]
                filled += length
            if filled < self.tgt_len and self.partial == "drop":
                return None
            n_filled += filled
        if n_filled == 0:
            return None
        batch = Batch(torch.from_numpy(tokens), torch.from_numpy(targets), None)
        if self._batch == 0:
            batch = batch._replace(reset=batch.tokens.new_ones(stop - start, dtype=torch.bool))
        self._batch += 1
        return batch

    def _take(self, row: int) -> Iterator[tuple[int, int]]:
        """Yields token ranges for the row's next segment; assigns sentences to it when needed."""
        wanted = self.tgt_len
        position, end = self._spans[row]
        while wanted:
            if end - position <= 1:  # only the closing <S> is left, which was a target
                if self._dealt == self.n_sentences:
                    break
                sentence = self._order[self._dealt]
                self._dealt += 1
                position, end = int(self._edges[sentence]), int(self._edges[sentence + 1])
            length = min(end - 1 - position, wanted)
            yield position, position + length
            position += length
            wanted -= length
        self._spans[row] = position, end

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch, for JSON; the same in every process of a run."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "dealt": self._dealt,
            "spans": [list(span) for span in self._spans],
            "batch_size": self.batch_size,
            "n_sentences": self.n_sentences,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of `state_dict`; ValueError if it belongs to other sentences."""
        check_state(state, batch_size=self.batch_size, n_sentences=self.n_sentences, seed=self.seed)
        for name in ("epoch", "batch"):
            check_range(state, name)
        check_range(state, "dealt", self.n_sentences + 1)
        spans = state.get("spans")
        if not (isinstance(spans, list) and len(spans) == self.batch_size) or not all(
            self._is_span(span) for span in spans
        ):
            expected = f"{self.batch_size} ranges of the {len(self._tokens):,} tokens"
            raise ValueError(f"data position: spans: expected {expected}, got {shortened(spans)}")
        self._start_pass(state["epoch"])
        self._batch, self._dealt = state["batch"], state["dealt"]
        self._spans = [(position, end) for position, end in spans]

    def _is_span(self, span: Any) -> bool:
        """Whether a value of a saved state is a range of tokens."""
        if not isinstance(span, list) or len(span) != 2:
            return False
        ends = all(is_int(end, at_most=len(self._tokens)) for end in span)
        return ends and span[0] <= span[1]


def sentence_edges(tokens: TokenArray, boundary: int) -> NDArray[np.int64]:
    """First token of each sentence, and the end of the last one: int64 `[n_sentences + 1]`.

    Raises ValueError unless all tokens belong to sentences, which begin and end with `<S>`.
    """
    marks = np.concatenate(
        [
            np.flatnonzero(tokens[at : at + SCAN_TOKENS] == boundary) + at
            for at in range(0, len(tokens), SCAN_TOKENS)
        ]
        or [np.empty(0, dtype=np.int64)]
    )
    edges = np.append(marks[::2], len(tokens)).astype(np.int64)
    ends = marks[1::2] + 1
    if len(marks) == 0 or marks[0] != 0 or not np.array_equal(ends, edges[1:]):
        raise ValueError(f"tokens: expected sentences between two tokens {boundary} (<S>)")
    return edges
