"""AdaptiveSoftmax: probabilities, losses in token order, tied shapes, targets out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transformer_xl.nn import AdaptiveSoftmax

V, CUTOFFS = 20, (5, 12)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "narrow": {"d_embed": 4},
    "one-table": {"cutoffs": CUTOFFS},
    "one-narrow-table": {"cutoffs": CUTOFFS, "d_embed": 4},
    "bins": {"cutoffs": CUTOFFS, "div_val": 2},
    "bins-first-unprojected": {"cutoffs": CUTOFFS, "div_val": 2, "proj_same_dim": False},
}


@pytest.fixture(params=KINDS)
def softmax(request: pytest.FixtureRequest) -> AdaptiveSoftmax:
    torch.manual_seed(0)
    module = AdaptiveSoftmax(V, **{"d_embed": 8, "d_proj": 8, **KINDS[request.param]}).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def hidden_and_target() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 7, 8, dtype=torch.float64, generator=generator)
    target = torch.randint(0, V, (2, 7), generator=generator)
    target[0, 3] = -100
    return hidden, target


def test_probabilities_sum_to_1(softmax: AdaptiveSoftmax) -> None:
    hidden, _ = hidden_and_target()
    log_prob = softmax.log_prob(hidden)
    assert log_prob.shape == (2, 7, V)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(2, 7, dtype=torch.float64))


def test_losses_are_in_token_order_and_reduced_over_scored_targets(
    softmax: AdaptiveSoftmax,
) -> None:
    hidden, target = hidden_and_target()
    scored = target != -100
    picked = softmax.log_prob(hidden).gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    expected = -picked * scored
    nll = softmax(hidden, target, reduction="none")
    torch.testing.assert_close(nll, expected)
    torch.testing.assert_close(softmax(hidden, target, reduction="sum"), expected.sum())
    torch.testing.assert_close(softmax(hidden, target), expected.sum() / scored.sum())


def test_mean_loss_has_the_gradients_of_the_losses(softmax: AdaptiveSoftmax) -> None:
    hidden, target = hidden_and_target()
    hidden.requires_grad_()
    inputs = [hidden, *softmax.parameters()]
    of_mean = torch.autograd.grad(softmax(hidden, target), inputs)
    by_token = softmax(hidden, target, reduction="none").sum() / (target != -100).sum()
    torch.testing.assert_close(of_mean, torch.autograd.grad(by_token, inputs))


def test_names_of_the_original() -> None:
    bins = AdaptiveSoftmax(V, 8, 8, CUTOFFS, 2)
    names = {f"out_layers.{k}.{part}" for k in range(3) for part in ("weight", "bias")}
    names |= {f"out_projs.{k}" for k in range(3)} | {"cluster_weight", "cluster_bias"}
    assert set(bins.state_dict()) == names
    assert bins.out_projs[2].shape == (8, 2)
    plain = AdaptiveSoftmax(V, 8, 8)
    assert set(plain.state_dict()) == {"out_layers.0.weight", "out_layers.0.bias"}


def test_an_unknown_reduction_is_refused() -> None:
    hidden, target = hidden_and_target()
    with pytest.raises(ValueError, match="reduction: expected mean, sum or none, got 'max'"):
        AdaptiveSoftmax(V, 8, 8).double()(hidden, target, reduction="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [-1, V])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_named(target: int, reduction: Any) -> None:
    with pytest.raises(IndexError, match="target"):
        AdaptiveSoftmax(V, 8, 8)(torch.zeros(1, 8), torch.tensor([target]), reduction=reduction)
