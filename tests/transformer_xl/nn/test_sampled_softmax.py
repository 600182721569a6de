"""Sampled softmax: the sampler's law, and the full softmax's gradient in expectation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.nn import LogUniformSampler, SampledSoftmax
from transformer_xl.nn.sampled_softmax import sampled_nll

V, D, N = 40, 6, 5


@pytest.fixture
def softmax() -> SampledSoftmax:
    torch.manual_seed(0)
    module = SampledSoftmax(V, D, n_sample=8)
    nn.init.normal_(module.weight, std=0.5)
    nn.init.normal_(module.bias, std=0.5)
    return module


def rows_and_targets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    return hidden, torch.tensor([0, 1, 7, 25, 39])


def gradients(softmax: SampledSoftmax, loss: Tensor, hidden: Tensor) -> Tensor:
    """All of them, in one vector."""
    grads = torch.autograd.grad(loss, [hidden, *softmax.parameters()])
    return torch.cat([grad.flatten() for grad in grads])


def full_gradients(softmax: SampledSoftmax) -> Tensor:
    hidden, target = rows_and_targets()
    return gradients(softmax.eval(), softmax(hidden, target), hidden)


def mean_gradients(softmax: SampledSoftmax, n_sample: int, n_calls: int) -> tuple[Tensor, float]:
    """Over many calls, and the standard error of its norm's distance from the expectation."""
    softmax.train().n_sample = n_sample
    generator = torch.Generator().manual_seed(2)
    hidden, target = rows_and_targets()
    found = torch.stack(
        [
            gradients(softmax, softmax(hidden, target, generator=generator), hidden)
            for _ in range(n_calls)
        ]
    )
    return found.mean(0), float((found.var(0).sum() / n_calls).sqrt())


@pytest.mark.parametrize("vocab_size", [1, 3, 40])
def test_the_samplers_law(vocab_size: int) -> None:
    sampler = LogUniformSampler(vocab_size)
    probs = sampler.log_prob(torch.arange(vocab_size)).exp()
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0))
    assert (probs.diff() < 0).all()
    device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    drawn = sampler.draw(50_000, device=device, generator=generator).bincount(minlength=vocab_size)
    deviation = (drawn - 50_000 * probs) / (50_000 * probs * (1 - probs)).sqrt().clamp(min=1)
    assert deviation.abs().max() < 4.5


def test_the_gradient_is_the_full_softmaxs_in_expectation(softmax: SampledSoftmax) -> None:
    """Up to a bias of order 1 / n_sample, which eight times the draws make eight times smaller."""
    due = full_gradients(softmax)
    distances = []
    for n_sample, n_calls in ((40, 400), (320, 250)):
        mean, error = mean_gradients(softmax, n_sample, n_calls)
        assert error < 0.05 * due.norm()
        distances.append(float((mean - due).norm() / due.norm()))
    assert distances[0] < 0.15
    assert distances[1] < 0.04


def test_the_sum_over_the_vocabulary_is_without_bias(softmax: SampledSoftmax) -> None:
    """exp(nll) · exp(l_y) is the estimated sum, so the mean of exp(nll) is 1 / p."""
    hidden, target = rows_and_targets()
    logits = nn.functional.linear(hidden, softmax.weight, softmax.bias)
    due = 1 / logits.softmax(1).gather(1, target[:, None])[:, 0]
    parts = softmax.weight, softmax.bias, softmax.sampler, softmax.n_sample
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        found = torch.stack(
            [sampled_nll(hidden, target, *parts, generator).exp() for _ in range(1000)]
        )
    error = found.std(0) / 1000**0.5
    assert ((found.mean(0) - due).abs() < 4.5 * error).all()


def test_a_draw_that_is_the_target_counts_once() -> None:
    """With two tokens and the target 0, what is left is the other token, however often drawn."""
    softmax = SampledSoftmax(2, D, n_sample=1000)
    hidden = torch.randn(3, D)
    target = torch.zeros(3, dtype=torch.int64)
    full = softmax.eval()(hidden, target)
    sampled = softmax.train()(hidden, target, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled, full, rtol=0.1, atol=0)


def test_ignored_targets_and_those_out_of_range(softmax: SampledSoftmax) -> None:
    hidden, target = rows_and_targets()
    seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
    scored = softmax(hidden[1:3], target[1:3], generator=seeds[0])
    marked = target.clone()
    marked[[0, 3, 4]] = -100
    torch.testing.assert_close(softmax(hidden, marked, generator=seeds[1]), scored)
    assert softmax(hidden, torch.full((N,), -100)) == 0
    for training in (True, False):
        with pytest.raises(IndexError):
            softmax.train(training)(hidden, torch.full((N,), V))


def test_training_lowers_the_full_loss(softmax: SampledSoftmax) -> None:
    hidden, target = rows_and_targets()
    optimizer = torch.optim.Adam(softmax.parameters(), lr=0.05)
    before = softmax.eval()(hidden, target).item()
    softmax.train()
    for _ in range(100):
        optimizer.zero_grad()
        softmax(hidden.detach(), target).backward()
        optimizer.step()
    assert softmax.eval()(hidden, target).item() < 0.2 * before


@pytest.mark.parametrize(("vocab_size", "n_sample"), [(0, 1), (5, 0)])
def test_sizes_are_checked(vocab_size: int, n_sample: int) -> None:
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        SampledSoftmax(vocab_size, D, n_sample)


@pytest.mark.parametrize("training", [True, False])
def test_rows_that_are_not_scored_may_hold_anything(
    softmax: SampledSoftmax, training: bool
) -> None:
    softmax.train(training)
    _, target = rows_and_targets()
    target[1] = -100
    results = []
    for value in (0.0, torch.nan):
        hidden = rows_and_targets()[0].detach()
        hidden[1] = value
        loss = softmax(hidden.requires_grad_(), target, generator=torch.Generator().manual_seed(2))
        results.append(torch.cat([loss[None], gradients(softmax, loss, hidden)]))
    assert torch.equal(*results)
    assert results[1].isfinite().all()
