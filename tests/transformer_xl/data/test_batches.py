"""Ordered batches: continuity, rows of several processes, exact resume, what is scored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer_xl.data import Batch, OrderedBatches

sizes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 60)).map(
    lambda drawn: (drawn[0], drawn[1], drawn[0] * (drawn[1] + 1) + drawn[2])
)  # batch_size, tgt_len, n_tokens: at least one segment


def tokens_of(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint16)


def same(left: Batch, right: Batch) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a is b if a is None else torch.equal(a, b) for a, b in pairs)


@given(sizes)
def test_segments_reassemble_to_the_streams(size: tuple[int, int, int]) -> None:
    batch_size, tgt_len, n = size
    batches = OrderedBatches(tokens_of(n), batch_size, tgt_len)
    read = list(batches)
    stream_len = n // batch_size
    streams = torch.arange(stream_len * batch_size).reshape(batch_size, stream_len)
    assert torch.equal(torch.cat([batch.tokens for batch in read], 1), streams[:, :-1])
    assert torch.equal(torch.cat([batch.targets for batch in read], 1), streams[:, 1:])
    assert len(read) == len(batches)
    assert sum(batch.targets.numel() for batch in read) == batches.n_tokens


@given(sizes, st.data())
def test_rows_of_two_processes_are_the_whole_batch(
    size: tuple[int, int, int], data: st.DataObject
) -> None:
    batch_size, tgt_len, n = size
    cut = data.draw(st.integers(0, batch_size))
    parts = [rows for rows in ((0, cut), (cut, batch_size)) if rows[0] < rows[1]]
    shares = [OrderedBatches(tokens_of(n), batch_size, tgt_len, rows=rows) for rows in parts]
    whole = OrderedBatches(tokens_of(n), batch_size, tgt_len)
    assert sum(share.n_tokens for share in shares) == whole.n_tokens
    for batch, *pieces in zip(whole, *shares, strict=True):
        assert torch.equal(batch.tokens, torch.cat([piece.tokens for piece in pieces]))
        assert torch.equal(batch.targets, torch.cat([piece.targets for piece in pieces]))


@given(sizes, st.integers(0, 30), st.booleans())
def test_resuming_gives_the_remaining_batches(
    size: tuple[int, int, int], n_read: int, loop: bool
) -> None:
    batch_size, tgt_len, n = size
    first = OrderedBatches(tokens_of(n), batch_size, tgt_len, loop=loop)
    reading = iter(first)
    consumed = sum(1 for _ in itertools.islice(reading, n_read))
    second = OrderedBatches(tokens_of(n), batch_size, tgt_len, loop=loop)
    if consumed == n_read:  # else the pass has ended, and the next one would start
        second.load_state_dict(first.state_dict())
        remaining = zip(itertools.islice(reading, 9), itertools.islice(second, 9), strict=True)
        assert all(same(a, b) for a, b in remaining)
        assert first.state_dict() == second.state_dict()


def test_every_pass_begins_with_all_rows_reset() -> None:
    batches = OrderedBatches(tokens_of(21), 2, 4, loop=True)
    reset = [batch.reset for batch in itertools.islice(batches, 2 * len(batches))]
    begins = [None if row is None else row.tolist() for row in reset]
    assert begins == [[True, True], None, None] * 2


def test_a_finished_pass_is_read_again_from_the_start() -> None:
    batches = OrderedBatches(tokens_of(20), 2, 4)
    first, second = list(batches), list(batches)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert batches.state_dict()["epoch"] == 2


def test_the_last_segment_is_shorter() -> None:
    lengths = [batch.tokens.shape[1] for batch in OrderedBatches(tokens_of(24), 2, 4)]
    assert lengths == [4, 4, 3]


def test_batches_are_int64_tensors_of_their_own() -> None:
    tokens = tokens_of(24)
    batch = next(iter(OrderedBatches(tokens, 2, 4)))
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    batch.tokens.zero_()
    assert np.array_equal(tokens, tokens_of(24))
    assert batch.targets[0].tolist() == [1, 2, 3, 4]


def test_a_corpus_shorter_than_one_segment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"9 tokens in 2 streams are 4 a stream.*tgt_len \+ 1 = 5"):
        OrderedBatches(tokens_of(9), 2, 4)


@pytest.mark.parametrize("rows", [(0, 3), (-1, 1), (1, 1), (2, 1)])
def test_rows_outside_the_batch_are_refused(rows: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="rows: expected 0 <= start < stop <= 2"):
        OrderedBatches(tokens_of(20), 2, 4, rows=rows)


@pytest.mark.parametrize(("batch_size", "tgt_len"), [(0, 4), (-1, 4), (2, 0), (2, -3)])
def test_sizes_that_are_not_positive_are_refused(batch_size: int, tgt_len: int) -> None:
    with pytest.raises(ValueError, match="expected a positive"):
        OrderedBatches(tokens_of(20), batch_size, tgt_len)


def test_a_position_in_other_streams_is_refused() -> None:
    state = OrderedBatches(tokens_of(20), 2, 4).state_dict()
    with pytest.raises(ValueError, match="saved with batch_size 2, this run has 4"):
        OrderedBatches(tokens_of(20), 4, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with stream_len 10, this run has 15"):
        OrderedBatches(tokens_of(30), 2, 4).load_state_dict(state)
