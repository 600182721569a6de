"""`adaptive_sample` with temperatures and probabilities that float32 holds as 0 or infinity."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import adaptive_sample


@pytest.fixture
def logits():
    """The hidden rows and the head of a softmax whose largest logits are its diagonal's."""
    return torch.eye(6), torch.randn(20, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-46},
        {"temperature": 1e-40},
        {"temperature": 1e-46, "top_k": 5},
        {"temperature": 1e-46, "top_p": 0.5},
        {"top_p": 1e-46},
        {"top_p": 1e-46, "top_k": 5},
    ],
    ids=str,
)
def test_tiny_numbers_return_the_most_probable_token(logits, options):
    hidden, weight = logits
    drawn = adaptive_sample(hidden, weight, [], cutoffs=(), **options)
    assert torch.equal(drawn, (hidden @ weight.T).argmax(1))


def test_an_infinite_temperature_draws_no_forbidden_token(logits):
    hidden, weight = logits
    bias = torch.zeros(20)
    bias[3:] = -torch.inf
    for _ in range(20):
        options = {"cutoffs": (), "head_bias": bias, "temperature": 1e46}
        assert (adaptive_sample(hidden, weight, [], **options) < 3).all()
