"""AdaptiveEmbedding: tables, projections, scale, names, tokens out of range."""

from __future__ import annotations

import pytest
import torch

from transformer_xl.nn import AdaptiveEmbedding

CUTOFFS = (5, 12)


def test_every_token_is_its_row_projected_and_scaled() -> None:
    module = AdaptiveEmbedding(20, 8, 8, CUTOFFS, 2)
    tokens = torch.arange(20).view(4, 5)
    embedded = module(tokens).view(20, 8)
    for token in range(20):
        k = sum(token >= cutoff for cutoff in CUTOFFS)
        row = module.emb_layers[k].weight[token - (0, *CUTOFFS)[k]]
        torch.testing.assert_close(embedded[token], module.emb_projs[k] @ row * 8**0.5)


def test_one_table_is_projected_only_where_widths_differ() -> None:
    equal, narrow = AdaptiveEmbedding(20, 8, 8), AdaptiveEmbedding(20, 4, 8, CUTOFFS)
    assert set(equal.state_dict()) == {"emb_layers.0.weight"}
    assert set(narrow.state_dict()) == {"emb_layers.0.weight", "emb_projs.0"}
    tokens = torch.tensor([[0, 19, 7]])
    torch.testing.assert_close(equal(tokens), equal.emb_layers[0](tokens) * 8**0.5)
    expected = narrow.emb_layers[0](tokens) @ narrow.emb_projs[0].t() * 8**0.5
    torch.testing.assert_close(narrow(tokens), expected)


def test_a_square_bin_is_projected_as_asked() -> None:
    always = AdaptiveEmbedding(20, 8, 8, CUTOFFS, 2).state_dict()
    unless_same = AdaptiveEmbedding(20, 8, 8, CUTOFFS, 2, proj_same_dim=False).state_dict()
    assert set(always) - set(unless_same) == {"emb_projs.0"}


def test_every_table_receives_a_gradient_even_without_tokens() -> None:
    module = AdaptiveEmbedding(20, 8, 8, CUTOFFS, 2)
    module(torch.tensor([[0, 1]])).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("div_val", [1, 2])
def test_sparse_gradients_are_the_dense_ones(div_val: int) -> None:
    dense = AdaptiveEmbedding(20, 8, 8, CUTOFFS, div_val)
    sparse = AdaptiveEmbedding(20, 8, 8, CUTOFFS, div_val, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    for module in (dense, sparse):
        module(torch.tensor([[0, 19, 7, 7]])).square().sum().backward()
    for table, due in zip(sparse.emb_layers, dense.emb_layers, strict=True):
        assert table.weight.grad.is_sparse
        torch.testing.assert_close(table.weight.grad.to_dense(), due.weight.grad)


@pytest.mark.parametrize("token", [-1, 20])
@pytest.mark.parametrize("div_val", [1, 2])
def test_a_token_out_of_range_is_named(token: int, div_val: int) -> None:
    module = AdaptiveEmbedding(20, 8, 8, CUTOFFS, div_val)
    with pytest.raises(IndexError, match=r"tokens.*\b20\b"):
        module(torch.tensor([[3, token]]))
