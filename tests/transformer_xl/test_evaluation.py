"""Scores: what is summed, over what, and that the protocol says so."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from transformer_xl.config import RunConfig
from transformer_xl.data import OrderedBatches, ShuffledSentenceBatches
from transformer_xl.evaluation import Lengths, Score, evaluate, score
from transformer_xl.model import TransformerXL

TOKENS = np.random.default_rng(0).integers(0, 256, 131).astype(np.uint8)


@pytest.fixture
def model(tiny_config: RunConfig) -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(tiny_config.model)


def test_with_enough_memory_the_score_is_one_long_pass(model: TransformerXL) -> None:
    found = evaluate(model, TOKENS, batch_size=2, tgt_len=7, mem_len=64)
    rows = torch.from_numpy(TOKENS[:130].reshape(2, 65).astype(np.int64))
    model.eval()
    expected = model(rows[:, :-1], targets=rows[:, 1:]).loss
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    assert found.n_tokens == 2 * 64


def test_score_does_not_depend_on_the_segment_at_equal_reach(model: TransformerXL) -> None:
    """same_length with n keys: the same distribution for each token, however it is cut."""
    losses = [
        evaluate(model, TOKENS, batch_size=1, tgt_len=t, mem_len=20, same_length=True).loss
        for t in (1, 5, 130)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("lengths", [Lengths(12), Lengths(0), Lengths(40, 9), Lengths(9, -1, True)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_both_paths_have_one_score(model: TransformerXL, lengths: Lengths, batch_size: int) -> None:
    """The last segment of a stream is shorter than the others."""
    options = {"batch_size": batch_size, "tgt_len": 9, **lengths._asdict()}
    cached = evaluate(model, TOKENS, **options)
    projected = evaluate(model, TOKENS, cached=False, **options)
    assert cached.loss == pytest.approx(projected.loss, rel=1e-6)
    note = ", hidden states projected again for each segment"
    assert projected.protocol == cached.protocol + note


def test_protocol_names_the_reason_for_hidden_states(model: TransformerXL) -> None:
    object.__setattr__(model.config, "attn_type", 2)  # no config accepts it yet
    found = evaluate(model, TOKENS, batch_size=2, tgt_len=8, mem_len=4)
    object.__setattr__(model.config, "attn_type", 0)
    expected = evaluate(model, TOKENS, batch_size=2, tgt_len=8, mem_len=4, cached=False)
    assert found.loss == expected.loss
    assert found.protocol == f"{expected.protocol} (attn_type 2)"


def test_sentence_batches_have_one_score(model: TransformerXL) -> None:
    sentences = [7, *TOKENS[:20] % 5, 7, 7, *TOKENS[20:43] % 5, 7, 7, *TOKENS[43:60] % 5, 7] * 3
    tokens = np.array(sentences, dtype=np.uint8)
    losses = []
    for cached in (True, False):
        batches = ShuffledSentenceBatches(tokens, 7, 2, 8, seed=1, partial="pad")
        losses.append(score(model, batches, Lengths(10), len(tokens), cached=cached).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_model_has_its_lengths_and_mode_back(model: TransformerXL) -> None:
    model.train()
    evaluate(model, TOKENS, batch_size=2, tgt_len=4, mem_len=30, clamp_len=9, same_length=True)
    assert (model.mem_len, model.clamp_len, model.same_length) == (12, -1, False)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_protocol_names_everything(model: TransformerXL) -> None:
    batches = OrderedBatches(TOKENS, 4, 8)
    found = score(model, batches, Lengths(3, 5, True), 131, max_steps=2, source="test split of x")
    assert found.n_tokens == 64
    assert found.protocol == (
        "test split of x, batch 4, tgt_len 8, mem_len 3, clamp_len 5, same_length yes, "
        "every stream starts without memory, the first 2 segments of each stream, "
        "67 of 131 tokens not scored, float32"
    )


def test_protocol_names_the_precision(model: TransformerXL) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate(model, TOKENS, batch_size=1, tgt_len=16, mem_len=0)
    assert found.protocol.endswith("autocast to bfloat16")


def test_a_cache_of_another_dtype_is_named(model: TransformerXL) -> None:
    options = {"batch_size": 2, "tgt_len": 8, "mem_len": 12}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # the rounding of untrained weights would change nothing
    expected = evaluate(model, TOKENS, **options)
    found = evaluate(model, TOKENS, **options, cache_dtype=torch.bfloat16)
    assert found.loss != expected.loss
    assert found.loss == pytest.approx(expected.loss, rel=1e-3)
    assert found.protocol == f"{expected.protocol}, keys and values in bfloat16"
    same = evaluate(model, TOKENS, **options, cache_dtype=torch.float32)
    assert (same.loss, same.protocol) == (expected.loss, expected.protocol)
    with pytest.raises(ValueError, match=r"cache_dtype: expected None, .*\(cached=False\), got"):
        evaluate(model, TOKENS, **options, cached=False, cache_dtype=torch.bfloat16)


def test_metrics() -> None:
    found = Score(loss=math.log(8), n_tokens=100, seconds=4.0, protocol="")
    assert (found.bpc, found.ppl, found.tokens_per_second) == pytest.approx((3.0, 8.0, 25.0))
    assert found.as_dict()["bpc"] == pytest.approx(3.0)


def test_processes_share_the_rows(model: TransformerXL) -> None:
    """Sums over the rows of several processes are the sums over all rows."""
    whole = evaluate(model, TOKENS, batch_size=4, tgt_len=8, mem_len=12)

    def sums(rows: tuple[int, int]) -> Iterator[torch.Tensor]:
        kept: list[torch.Tensor] = []
        batches = OrderedBatches(TOKENS, 4, 8, rows=rows)
        score(model, batches, Lengths(12), 131, total=lambda s: kept.append(s.clone()) or s)
        return iter(kept)

    (first,), (second,) = sums((0, 1)), sums((1, 4))
    loss, n_tokens = (first + second).tolist()
    assert n_tokens == whole.n_tokens
    assert loss / n_tokens == pytest.approx(whole.loss, rel=1e-6)


def test_corpus_shorter_than_a_segment(model: TransformerXL) -> None:
    with pytest.raises(ValueError, match="shorter than one segment"):
        evaluate(model, TOKENS, batch_size=10, tgt_len=64, mem_len=0)
