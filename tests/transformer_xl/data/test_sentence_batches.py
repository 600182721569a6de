"""Shuffled sentence batches: every target once, sentences whole, processes alike, exact resume."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer_xl.data import ShuffledSentenceBatches
from transformer_xl.data.sentence_batches import sentence_edges

BOUNDARY = 0
corpora = st.lists(st.integers(0, 7), min_size=1, max_size=30).map(
    lambda lengths: [
        [BOUNDARY, *range(1 + 10 * i, 1 + 10 * i + length), BOUNDARY]
        for i, length in enumerate(lengths)
    ]
)  # sentences of words that no other sentence has


def tokens_of(sentences: list[list[int]]) -> np.ndarray:
    return np.array([token for sentence in sentences for token in sentence], dtype=np.uint16)


def pairs_of(sentences: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter(pair for sentence in sentences for pair in itertools.pairwise(sentence))


def read_pairs(batches: ShuffledSentenceBatches) -> Counter[tuple[int, int]]:
    read: Counter[tuple[int, int]] = Counter()
    for tokens, targets, _ in batches:
        scored = targets != -100
        read.update(zip(tokens[scored].tolist(), targets[scored].tolist(), strict=True))
    return read


@given(corpora, st.integers(1, 4), st.integers(1, 9), st.sampled_from([None, 0, 5]))
def test_padded_batches_score_every_target_once(
    sentences: list[list[int]], batch_size: int, tgt_len: int, seed: int | None
) -> None:
    batches = ShuffledSentenceBatches(
        tokens_of(sentences), BOUNDARY, batch_size, tgt_len, seed=seed, partial="pad"
    )
    assert batches.n_sentences == len(sentences)
    assert read_pairs(batches) == pairs_of(sentences)
    assert pairs_of(sentences).total() == batches.n_tokens


@given(corpora, st.integers(1, 3), st.integers(1, 5), st.integers(0, 3))
def test_dropping_the_partial_batch_leaves_only_full_ones(
    sentences: list[list[int]], batch_size: int, tgt_len: int, seed: int
) -> None:
    arguments = (tokens_of(sentences), BOUNDARY, batch_size, tgt_len)
    padded = list(ShuffledSentenceBatches(*arguments, seed=seed, partial="pad"))
    full = [batch for batch in padded if bool((batch.targets != -100).all())]
    if not full:
        with pytest.raises(ValueError, match="do not fill one batch"):
            ShuffledSentenceBatches(*arguments, seed=seed)
        return
    kept = list(ShuffledSentenceBatches(*arguments, seed=seed))
    assert len(kept) == len(full)
    for left, right in zip(kept, full, strict=True):
        assert torch.equal(left.tokens, right.tokens)
        assert torch.equal(left.targets, right.targets)


@given(corpora, st.integers(2, 4), st.integers(1, 9), st.data())
def test_rows_of_two_processes_are_the_whole_batch(
    sentences: list[list[int]], batch_size: int, tgt_len: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, batch_size - 1))
    whole, left, right = (
        ShuffledSentenceBatches(
            tokens_of(sentences), BOUNDARY, batch_size, tgt_len, seed=1, rows=rows, partial="pad"
        )
        for rows in (None, (0, cut), (cut, batch_size))
    )
    for batch, *parts in zip(whole, left, right, strict=True):
        assert torch.equal(batch.tokens, torch.cat([part.tokens for part in parts]))
        assert torch.equal(batch.targets, torch.cat([part.targets for part in parts]))
    assert left.state_dict() == right.state_dict() == whole.state_dict()


@given(corpora, st.integers(1, 3), st.integers(1, 6), st.integers(0, 20))
def test_resuming_gives_the_remaining_batches(
    sentences: list[list[int]], batch_size: int, tgt_len: int, n_read: int
) -> None:
    first, second = (
        ShuffledSentenceBatches(
            tokens_of(sentences), BOUNDARY, batch_size, tgt_len, seed=3, loop=True, partial="pad"
        )
        for _ in range(2)
    )
    reading = iter(first)
    for _ in range(n_read):
        next(reading)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resumed = iter(second)
    for _ in range(5):
        left, right = next(reading), next(resumed)
        assert torch.equal(left.tokens, right.tokens)
        assert torch.equal(left.targets, right.targets)
        assert (left.reset is None) == (right.reset is None)


def test_each_pass_has_an_order_of_its_own_and_a_seed_repeats_it() -> None:
    sentences = [[0, i + 1, 0] for i in range(50)]

    def words(seed: int | None) -> list[list[int]]:
        batches = ShuffledSentenceBatches(tokens_of(sentences), BOUNDARY, 1, 100, seed=seed)
        passes = (batch for _ in range(2) for batch in batches)
        return [[t for t in batch.targets.flatten().tolist() if t] for batch in passes]

    assert words(7) == words(7)
    assert words(7) != words(8)
    assert words(None)[0] == list(range(1, 51))


def test_only_the_first_batch_of_a_pass_resets_the_memory() -> None:
    sentences = [[0, 1, 2, 3, 0]] * 6
    batches = ShuffledSentenceBatches(tokens_of(sentences), BOUNDARY, 2, 4, seed=0, loop=True)
    begins = [batch.reset is not None for batch in itertools.islice(batches, 6)]
    assert begins == [True, False, False] * 2


def test_packing_follows_the_original() -> None:
    sentences = [[0, 1, 2, 0], [0, 3, 0], [0, 4, 5, 6, 7, 0], [0, 8, 9, 0]]
    batches = ShuffledSentenceBatches(
        tokens_of(sentences), BOUNDARY, 2, 4, seed=None, partial="pad"
    )
    read = [(batch.tokens.tolist(), batch.targets.tolist()) for batch in batches]
    # Row 0 takes the first two sentences, row 1 the third; row 0 then goes on in the second.
    assert read == [
        ([[0, 1, 2, 0], [0, 4, 5, 6]], [[1, 2, 0, 3], [4, 5, 6, 7]]),
        ([[3, 0, 8, 9], [7, 0, 0, 0]], [[0, 8, 9, 0], [0, -100, -100, -100]]),
    ]


@pytest.mark.parametrize("tokens", [[], [1, 2], [0, 1], [0, 1, 0, 2, 0, 3, 0], [1, 0, 0]])
def test_tokens_that_are_no_sentences_are_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="expected sentences between two tokens 0"):
        sentence_edges(np.array(tokens, dtype=np.uint16), BOUNDARY)


def test_a_position_in_another_order_is_refused() -> None:
    tokens = tokens_of([[0, 1, 0]] * 8)
    state = ShuffledSentenceBatches(tokens, BOUNDARY, 2, 2, seed=1).state_dict()
    with pytest.raises(ValueError, match="saved with seed 1, this run has 2"):
        ShuffledSentenceBatches(tokens, BOUNDARY, 2, 2, seed=2).load_state_dict(state)
