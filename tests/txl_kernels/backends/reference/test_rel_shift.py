"""The reference of rel_shift against the original's pad-and-view, where that is right."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_shift


def _pad_and_view(x):
    """The original's `_rel_shift`: a zero column in front, read as one row fewer."""
    Tq, R = x.shape[-2:]
    padded = torch.cat([x.new_zeros(*x.shape[:-1], 1), x], -1).view(*x.shape[:-2], R + 1, Tq)
    return padded[..., 1:, :].reshape(x.shape)


@pytest.mark.parametrize(("Tq", "Tm"), [(1, 0), (1, 7), (5, 0), (5, 3), (4, 11)])
def test_equals_the_original_below_the_causal_diagonal(Tq, Tm):
    x = torch.randn(2, 3, Tq, Tm + Tq)
    seen = torch.ones(Tq, Tm + Tq, dtype=torch.bool).tril(Tm)
    assert torch.equal(rel_shift(x, backend="reference")[..., seen], _pad_and_view(x)[..., seen])


def test_is_zero_where_the_original_wraps_around():
    x = torch.arange(15.0).reshape(3, 5)
    due = torch.tensor([[2.0, 3, 4, 0, 0], [6, 7, 8, 9, 0], [10, 11, 12, 13, 14]])
    assert torch.equal(rel_shift(x, backend="reference"), due)
