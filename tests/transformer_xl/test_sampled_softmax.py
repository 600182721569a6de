"""A model that trains on a sampled softmax: its weights are those of the full one, which scores."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from transformer_xl.config import ModelConfig
from transformer_xl.model import TransformerXL
from transformer_xl.nn import AdaptiveSoftmax

V = 400
FULL = ModelConfig(
    vocab_size=V, n_layer=1, d_model=16, n_head=2, d_head=8, d_inner=32, mem_len=8, dropout=0.0
)
SAMPLED = dataclasses.replace(FULL, sample_softmax=50)


def draw_segments(n: int) -> torch.Tensor:
    """Each token says the next: t + 1, of a vocabulary whose first tokens are the most frequent."""
    generator = torch.Generator().manual_seed(2)
    first = (torch.rand(n, 1, generator=generator) ** 3 * (V - 10)).long()
    return first + torch.arange(10)


@pytest.mark.parametrize("change", [{}, {"tie_weight": False}, {"d_embed": 12}], ids=str)
def test_its_full_perplexity_falls(change: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = TransformerXL(dataclasses.replace(SAMPLED, **change))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scored = draw_segments(64)

    def perplexity() -> float:
        model.eval()
        with torch.no_grad():
            loss = model(scored[:, :-1], targets=scored[:, 1:]).loss
        model.train()
        return math.exp(loss)

    before = perplexity()
    assert before > 0.9 * V
    for step in range(150):
        tokens = draw_segments(64 * (step + 2))[-64:]
        optimizer.zero_grad()
        model(tokens[:, :-1], targets=tokens[:, 1:]).loss.backward()
        optimizer.step()
    assert perplexity() < 0.1 * before


def test_in_evaluation_it_is_the_full_softmax() -> None:
    sampled, full = TransformerXL(SAMPLED).eval(), TransformerXL(FULL).eval()
    full.load_state_dict(sampled.state_dict())
    tokens = draw_segments(3)
    for reduction in ("mean", "sum", "none"):
        outputs = [model(tokens, targets=tokens, reduction=reduction) for model in (sampled, full)]
        assert torch.equal(outputs[0].loss, outputs[1].loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_unscored_targets_cost_nothing(reduction: str) -> None:
    softmax = AdaptiveSoftmax(V, 12, 16, n_sample=50)
    hidden, target = torch.randn(2, 5, 16), draw_segments(2)[:, :5]
    target[0, 1:], target[1, :] = -100, -100
    torch.manual_seed(3)
    marked = softmax(hidden, target, reduction=reduction)
    torch.manual_seed(3)
    alone = softmax(hidden[:1, :1], target[:1, :1], reduction=reduction)
    if reduction == "none":
        assert marked.shape == target.shape
        assert not marked.flatten()[1:].any()
        marked = marked[:1, :1]
    torch.testing.assert_close(marked, alone)
    assert not softmax(hidden, torch.full_like(target, -100), reduction=reduction).any()


def test_it_draws_while_training_only() -> None:
    softmax = AdaptiveSoftmax(V, 16, 16, n_sample=5)
    hidden, target = torch.randn(7, 16), torch.arange(7)
    first, second = (softmax(hidden, target) for _ in range(2))
    assert first != second
    softmax.eval()
    assert softmax(hidden, target) == softmax(hidden, target)


@pytest.mark.parametrize(("n_sample", "cutoffs"), [(-1, ()), (8, (100, 200))])
def test_what_cannot_be_sampled_is_refused(n_sample: int, cutoffs: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=f"n_sample: expected 0 or, without cutoffs, more, got {n_sample}"
    ):
        AdaptiveSoftmax(V, 16, 16, cutoffs, n_sample=n_sample)


@pytest.mark.parametrize("d_proj", [8, 12])
def test_rows_that_are_not_scored_may_hold_anything(d_proj: int) -> None:
    torch.manual_seed(3)
    softmax = AdaptiveSoftmax(V, 8, d_proj, n_sample=10).train()
    hidden = torch.randn(4, d_proj)
    hidden[1] = torch.nan
    hidden.requires_grad_()
    softmax(hidden, torch.tensor([3, -100, 0, 399])).backward()
    assert hidden.grad is not None
    assert hidden.grad[[0, 2, 3]].isfinite().all()
    assert torch.equal(hidden.grad[1], torch.zeros(d_proj))
    assert all(p.grad is None or p.grad.isfinite().all() for p in softmax.parameters())
