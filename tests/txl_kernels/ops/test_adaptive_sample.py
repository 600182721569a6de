"""Draws from the adaptive softmax follow its probabilities, in whatever pieces it is read."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import adaptive_log_prob, adaptive_sample
from txl_kernels.backends.reference import adaptive_sample as reference
from txl_kernels.backends.reference import adaptive_softmax
from txl_kernels.ops import adaptive_sample as op

V, CUTOFFS, D = 60, (10, 25), 6
N_DRAWS = 20_000


@pytest.fixture(params=["whole", "pieces"])
def weights(request, monkeypatch):
    """An adaptive softmax, whole or in pieces of 4 tokens and of 99 sorted rows."""
    if request.param == "pieces":
        monkeypatch.setattr(adaptive_softmax, "_MIN_COLUMNS", 4)
        monkeypatch.setattr(reference, "_SORTED_LOGITS", 99 * V)
        monkeypatch.setattr(op, "MERGED_TOKENS", 2)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tails = [(normal(3, D), normal(15, 3), normal(15)), (None, normal(35, D) / 2, None)]
    head = {"head_weight": normal(12, D) / 2, "head_bias": normal(12), "head_proj": normal(D, D)}
    return {**head, "tails": tails, "cutoffs": CUTOFFS}


def expected_probs(weights, hidden, temperature=1.0, top_k=None, top_p=None):
    """All probabilities [V] of one row, filtered by sorting them."""
    log_probs = adaptive_log_prob(hidden, **weights)[0].double()
    logits, order = log_probs.sort(descending=True)
    if top_k is not None:
        logits = logits[:top_k]
    probs = (logits / temperature).softmax(0)
    if top_p is not None:
        probs[probs.cumsum(0) - probs >= top_p] = 0
    return torch.zeros_like(log_probs).scatter(0, order[: len(probs)], probs / probs.sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_p": 0.3},
        {"top_p": 0.8, "temperature": 1.5},
        {"top_k": 5},
        {"top_k": 5, "top_p": 0.6, "temperature": 2.0},
        {"top_k": 2, "temperature": 0.5},
        {"top_k": 1000, "top_p": 1.0},
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(weights, options):
    hidden = torch.randn(1, D, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    drawn = adaptive_sample(
        hidden.expand(N_DRAWS, D), **weights, **options, generator=generator
    ).bincount(minlength=V)
    expected = expected_probs(weights, hidden, **options)
    assert not drawn[expected == 0].any()
    deviation = (drawn - N_DRAWS * expected) / (N_DRAWS * expected * (1 - expected)).sqrt().clamp(
        min=1.0
    )
    assert deviation.abs().max() < 4.5  # standard deviations, over at most 60 tokens


def test_temperature_0_takes_the_most_probable_token(weights):
    hidden = torch.randn(50, D)
    tokens = adaptive_sample(hidden, **weights, temperature=0)
    assert torch.equal(tokens, adaptive_log_prob(hidden, **weights).argmax(1))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_p": 0.5}, {"top_k": 3}])
def test_one_seed_draws_the_same_and_leaves_torchs_generator_alone(weights, options):
    hidden = torch.randn(40, D)
    torch.manual_seed(3)
    first, second, other = (
        adaptive_sample(hidden, **weights, **options, generator=torch.Generator().manual_seed(n))
        for n in (7, 7, 8)
    )
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_rows_are_drawn_apart(weights):
    hidden = torch.randn(2, D)
    rows = hidden.repeat_interleave(N_DRAWS // 2, 0)
    drawn = adaptive_sample(rows, **weights, generator=torch.Generator().manual_seed(0))
    for row, own in zip(hidden, drawn.chunk(2), strict=True):
        shares = own.bincount(minlength=V) / len(own)
        torch.testing.assert_close(
            shares, expected_probs(weights, row[None]).float(), rtol=0, atol=0.025
        )


def test_no_rows_and_no_tails():
    weight = torch.randn(9, D)
    assert adaptive_sample(torch.randn(0, D), weight, [], cutoffs=()).shape == (0,)
    assert adaptive_sample(torch.randn(0, D), weight, [], cutoffs=(), top_p=0.5).shape == (0,)
    assert adaptive_sample(torch.randn(3, D), weight, [], cutoffs=(), top_p=0.5).max() < 9


def test_low_precision_and_autocast(weights):
    hidden = torch.randn(5, D)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = adaptive_sample(hidden, **weights, top_p=0.9)
    assert tokens.dtype == torch.int64
    assert ((tokens >= 0) & (tokens < V)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "adaptive_sample: temperature must be at least 0, got -1"),
        ({"top_k": 0}, "adaptive_sample: top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"adaptive_sample: top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"adaptive_sample: top_p must be in \(0, 1\], got 1.1"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        adaptive_sample(torch.randn(2, D), torch.randn(9, D), [], cutoffs=(), **options)
