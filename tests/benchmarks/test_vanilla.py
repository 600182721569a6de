"""The vanilla Transformer of Table 9: every way of computing it has the result of its formula."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import vanilla

B, T, D_MODEL, H, D = 2, 13, 24, 3, 10


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return vanilla.VanillaLayer(D_MODEL, H, D, 32, T).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(B, T, D_MODEL, generator=torch.Generator().manual_seed(1))


def test_every_way_has_the_formulas_result(layer, x):
    found = vanilla.errors(layer, x)
    assert set(found) == {"inner-sdpa", "last-sdpa", "inner-eager", "last-eager", "cached"}
    assert max(found.values()) < 1e-5


def test_attention_to_a_later_token_is_found(layer, x, monkeypatch):
    monkeypatch.setattr(vanilla, "eager", lambda q, k, v: (q @ k.mT).softmax(dim=-1) @ v)
    found = vanilla.errors(layer, x)
    assert found["inner-eager"] > 1e-3
    assert found["inner-sdpa"] < 1e-5


def test_the_formula_is_torchs_layer(layer, x):
    torchs = torch.nn.TransformerEncoderLayer(D_MODEL, H, 32, dropout=0, batch_first=True).double()
    layer = vanilla.VanillaLayer(D_MODEL, H, D_MODEL // H, 32, T).requires_grad_(False)
    state = torchs.state_dict()
    state |= {"self_attn.in_proj_weight": layer.qkv_net.weight}
    state |= {"self_attn.out_proj.weight": layer.o_net.weight}
    for own, name in ((layer.feed_forward[0], "linear1"), (layer.feed_forward[2], "linear2")):
        state |= {f"{name}.weight": own.weight, f"{name}.bias": own.bias}
    torchs.load_state_dict(state)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    right = torchs((x + layer.position).double(), src_mask=mask, is_causal=True)
    torch.testing.assert_close(vanilla.formula(layer, x), right)


def test_a_moved_window_changes_the_hidden_states_of_its_tokens(layer, x):
    """Why a cache is no longer exact when the window has moved."""
    text = torch.cat([x, x[:, :1]], dim=1)
    first, second = layer(text[:, :T], vanilla.sdpa), layer(text[:, 1:], vanilla.sdpa)
    assert (first[:, 1:] - second[:, :-1]).abs().max() > 1e-2
