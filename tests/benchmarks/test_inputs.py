"""Counted pairs are those of the mask; inputs are random, repeatable and what the shape says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.inputs import AttentionShape, random_inputs
from benchmarks.peers.eager import hidden_keys

SHAPES = [
    AttentionShape(name="causal", B=2, H=3, Tq=7, Tm=5, D=4, causal=True),
    AttentionShape(name="no_memory", B=1, H=2, Tq=6, Tm=0, D=4, causal=True),
    AttentionShape(name="both_ways", B=2, H=1, Tq=5, Tm=3, D=4, causal=False),
    AttentionShape(name="one_query", B=1, H=1, Tq=1, Tm=9, D=4, causal=True),
    AttentionShape(name="padded", B=3, H=2, Tq=6, Tm=2, D=4, causal=False, key_lens=(8, 3, 1)),
    AttentionShape(name="padded_causal", B=2, H=2, Tq=6, Tm=2, D=4, causal=True, key_lens=(8, 4)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_attended_pairs_are_those_of_the_mask(shape):
    key_lens = None if shape.key_lens is None else torch.tensor(shape.key_lens)
    hidden = hidden_keys(shape.Tq, shape.n_keys, key_lens, shape.causal)
    hidden = torch.zeros(1, dtype=torch.bool) if hidden is None else hidden
    attended = ~hidden.expand(shape.B, shape.H, shape.Tq, shape.n_keys)
    assert shape.attended_pairs == int(attended.sum())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_inputs_are_random_and_repeatable(shape):
    inputs = random_inputs(shape, torch.float32, requires_grad=False)
    again = random_inputs(shape, torch.float32, requires_grad=False)
    assert inputs.r.shape == (1, shape.H, shape.n_rows, shape.D)
    for tensor, same in zip(inputs.leaves(), again.leaves(), strict=True):
        assert torch.equal(tensor, same)
        assert tensor.std() > 0.01
    assert not torch.equal(inputs.q, inputs.k)


def test_a_converted_copy_has_its_own_gradient():
    inputs = random_inputs(SHAPES[0], torch.bfloat16, requires_grad=True)
    precise = inputs.convert(torch.float64)
    assert torch.equal(precise.q, inputs.q.double())
    assert precise.q.is_leaf
    assert precise.q.requires_grad
