"""Ordered batches: a corpus cut into parallel streams that are read segment by segment, so that the
memory of one segment is the context of the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transformer_xl.data.files import is_int
from transformer_xl.data.token_file import TokenArray
from transformer_xl.messages import shortened


class Batch(NamedTuple):
    """One segment of every row.

    tokens: int64 `[rows, T]`.
    targets: int64 `[rows, T]`, the token after each; -100 for a position that is not scored.
    reset: bool `[rows]`, True where the row's memory must be emptied first; None: no row's.
    """

    tokens: Tensor
    targets: Tensor
    reset: Tensor | None


class TooShortError(ValueError):
    """A text that does not fill one batch."""


class OrderedBatches:
    """Segments of `batch_size` contiguous streams, in order.

    Stream b is tokens `[b·n, (b+1)·n)` with n = ⌊len(tokens) / batch_size⌋; the rest is not read. A
    stream's first token is context only, so n - 1 tokens of it are scored. The last segment
    of a pass is shorter where tgt_len does not divide n - 1. Every pass begins with all rows reset.

    Iterating continues after the last batch that was read, or at a loaded state; after a whole pass
    the next one starts at the beginning.

    Args:
        tokens: token ids, one-dimensional, of any unsigned type (a memory map is read lazily).
        batch_size: streams over all processes.
        tgt_len: tokens per segment.
        rows: (start, stop) of the streams that this process reads; None: all.
        loop: begin again at the end instead of stopping.

    Raises:
        ValueError: sizes that are not positive, or rows outside the batch.
        TooShortError: streams shorter than one segment.

    Source: Dai et al. 2019, section 3.2; the original's LMOrderedIterator.
    """

    def __init__(
        self,
        tokens: TokenArray,
        batch_size: int,
        tgt_len: int,
        *,
        rows: tuple[int, int] | None = None,
        loop: bool = False,
    ) -> None:
        self.rows = check_sizes(batch_size, tgt_len, rows)
        self.batch_size, self.tgt_len, self.loop = batch_size, tgt_len, loop
        self._stream_len = len(tokens) // batch_size
        if self._stream_len <= tgt_len:
            raise TooShortError(
                f"tokens: {len(tokens):,} tokens in {batch_size} streams are {self._stream_len:,} "
                f"a stream, shorter than one segment (tgt_len + 1 = {tgt_len + 1:,})"
            )
        streams = tokens[: batch_size * self._stream_len].reshape(batch_size, self._stream_len)
        self._streams = streams[slice(*self.rows)]  # [rows, n]
        self._epoch = 0
        self._position = 0  # of the next segment's first token in each stream

    def __len__(self) -> int:
        """Batches in one pass."""
        return -(-(self._stream_len - 1) // self.tgt_len)

    @property
    def n_tokens(self) -> int:
        """Targets in one pass over these rows."""
        return (self._stream_len - 1) * len(self._streams)

    def __iter__(self) -> Iterator[Batch]:
        last = self._stream_len - 1
        while True:
            while self._position < last:
                start = self._position
                self._position = min(start + self.tgt_len, last)
                segment = self._streams[:, start : self._position + 1]  # [rows, T + 1]
                tokens = torch.from_numpy(np.array(segment, dtype=np.int64))
                reset = tokens.new_ones(len(tokens), dtype=torch.bool) if start == 0 else None
                yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), reset)
            self._epoch += 1
            self._position = 0
            if not self.loop:
                return

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch, for JSON: the same for every process of a run."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "batch_size": self.batch_size,
            "stream_len": self._stream_len,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position of `state_dict`; ValueError if it is of other streams."""
        check_state(state, batch_size=self.batch_size, stream_len=self._stream_len)
        check_range(state, "epoch")
        check_range(state, "position", self._stream_len)
        self._epoch, self._position = state["epoch"], state["position"]


def check_sizes(batch_size: int, tgt_len: int, rows: tuple[int, int] | None) -> tuple[int, int]:
    """The (start, stop) of the rows, after raising ValueError for sizes or rows of no batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a positive integer, got {batch_size}")
    if tgt_len < 1:
        raise ValueError(f"tgt_len: expected a positive number of tokens, got {tgt_len}")
    start, stop = (0, batch_size) if rows is None else rows
    if not 0 <= start < stop <= batch_size:
        raise ValueError(f"rows: expected 0 <= start < stop <= {batch_size}, got {rows}")
    return start, stop


def check_state(state: Mapping[str, Any], **expected: int | None) -> None:
    """Raise ValueError where a saved state disagrees with `expected`, naming the field."""
    if not isinstance(state, Mapping):
        raise ValueError(f"data position: expected its fields, got {shortened(state)}")
    for name, value in expected.items():
        if (saved := state.get(name)) != value:
            raise ValueError(
                f"data position: saved with {name} {shortened(saved)}, this run has {value}"
            )


def check_range(state: Mapping[str, Any], name: str, end: int = 1 << 63) -> None:
    """Raise ValueError unless a field of a saved state is an integer in [0, end)."""
    if not is_int(value := state.get(name), at_most=end - 1):
        raise ValueError(
            f"data position: {name}: expected an integer in [0, {end:,}), got {shortened(value)}"
        )
