"""The CPU's dropout: its rate, its scale, its gradient, its randomness."""

from __future__ import annotations

import pytest
import torch

from transformer_xl.nn.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.15, 0.5, 0.99])
def test_drops_at_its_rate_and_keeps_the_mean(p) -> None:
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(1_000_003))
    kept = out != 0
    assert float(1 - kept.float().mean()) == pytest.approx(p, abs=2e-3)
    assert out[kept].unique().numel() == 1
    assert float(out.double().mean()) == pytest.approx(1.0, rel=20e-3)


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(400_000)) != 0).float() - 0.5
    for distance in (1, 2, 3, 4, 8):
        correlation = float((kept[distance:] * kept[:-distance]).mean()) / 0.25
        assert abs(correlation) < 0.01, distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 1, 9), (0, 4)])
def test_the_gradient_goes_where_the_output_came_from(shape, dtype) -> None:
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    out = Dropout(0.4)(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.dtype == dtype
    assert torch.equal(out, x * grad)


def test_a_seed_gives_a_mask_and_evaluation_gives_the_input() -> None:
    x, drop = torch.randn(4, 33), Dropout(0.3)
    masks = [torch.manual_seed(seed) and drop(x) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert drop.eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)
    assert Dropout(1.0)(x).eq(0).all()


def test_another_default_device_changes_nothing() -> None:
    x = torch.ones(4, 33)
    with torch.device("meta"):
        out = Dropout(0.3)(x)
    assert out.device == x.device
    assert 0 < int((out == 0).sum()) < out.numel()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_controls_the_masks(randomness) -> None:
    out = torch.vmap(Dropout(0.5), randomness=randomness)(torch.ones(2, 1000))
    assert out.unique().tolist() == [0.0, 2.0]
    assert torch.equal(out[0], out[1]) == (randomness == "same")


def test_gradients_of_torch_func_go_where_the_output_came_from() -> None:
    x, drop = torch.ones(1000), Dropout(0.25)
    grads, out = torch.func.grad_and_value(lambda y: drop(y).sum())(x)
    torch.testing.assert_close(grads.sum(), out)
    assert grads.unique().numel() == 2
