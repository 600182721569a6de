"""PositionwiseFeedForward: its formula and the original's names."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from transformer_xl.nn import PositionwiseFeedForward


def test_it_is_two_linear_layers_around_a_relu() -> None:
    module, x = PositionwiseFeedForward(6, 10, dropout=0.5).eval(), torch.randn(2, 3, 6)
    state = module.state_dict()
    assert list(state) == [f"CoreNet.{n}.{part}" for n in (0, 3) for part in ("weight", "bias")]
    inner = F.linear(x, state["CoreNet.0.weight"], state["CoreNet.0.bias"]).clamp(min=0)
    expected = F.linear(inner, state["CoreNet.3.weight"], state["CoreNet.3.bias"])
    torch.testing.assert_close(module(x), expected)


def test_dropout_is_on_in_training_only() -> None:
    module, x = PositionwiseFeedForward(6, 10, dropout=0.5), torch.randn(2, 3, 6)
    assert not torch.equal(module(x), module(x))
