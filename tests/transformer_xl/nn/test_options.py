"""Numeric options of the layers: NumPy's numbers are accepted; errors contain the option's name."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from transformer_xl.integrations import AdaptiveLogSoftmaxWithLoss
from transformer_xl.nn import (
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    DecoderLayer,
    GroupedQueryAttention,
    PositionwiseFeedForward,
    RelativeBias,
    RelativeMultiHeadAttention,
    SampledSoftmax,
    SinusoidalPositions,
)
from transformer_xl.nn.dropout import Dropout
from transformer_xl.nn.sampled_softmax import LogUniformSampler

NAN, INF = float("nan"), float("inf")
INTEGERS = {
    RelativeMultiHeadAttention: {
        "d_model": 8,
        "n_head": 2,
        "d_head": 4,
        "n_kv_head": 1,
        "clamp_len": 3,
    },
    RelativeBias: {"d_model": 8, "n_head": 2, "d_rel": 3, "extent": 5},
    GroupedQueryAttention: {
        "d_model": 8,
        "n_head": 2,
        "n_kv_head": 1,
        "d_head": 4,
        "rel": RelativeBias(8, 2, 3, 5),
    },
    SinusoidalPositions: {"d_model": 8, "clamp_len": 3},
    PositionwiseFeedForward: {"d_model": 8, "d_inner": 4},
    DecoderLayer: {"d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 4},
    AdaptiveEmbedding: {"vocab_size": 20, "d_embed": 8, "d_proj": 8, "div_val": 2},
    AdaptiveSoftmax: {"vocab_size": 20, "d_embed": 8, "d_proj": 8, "div_val": 1, "n_sample": 2},
    SampledSoftmax: {"vocab_size": 20, "d": 8, "n_sample": 2},
    LogUniformSampler: {"vocab_size": 20},
    AdaptiveLogSoftmaxWithLoss: {
        "in_features": 8,
        "n_classes": 20,
        "cutoffs": [5],
        "ignore_index": 3,
    },
}
FLOATS = {
    RelativeMultiHeadAttention: ("dropatt",),
    GroupedQueryAttention: ("scale", "pos_scale"),
    PositionwiseFeedForward: ("dropout",),
    DecoderLayer: ("dropout", "dropatt", "layer_norm_epsilon"),
    Dropout: ("p",),
}
# Options of torch's own, which checks them, and a module.
UNCHECKED = ("in_features", "n_classes", "cutoffs", "rel")
INTEGER_OPTIONS = [(m, o) for m, sizes in INTEGERS.items() for o in sizes if o not in UNCHECKED]
FLOAT_OPTIONS = [(module, option) for module, options in FLOATS.items() for option in options]


def name_of(value):
    return getattr(value, "__name__", str(value)[:9])


@pytest.mark.parametrize(("module", "option"), INTEGER_OPTIONS, ids=name_of)
def test_an_integer_may_be_of_numpy(module, option):
    sizes = INTEGERS[module]
    made = module(**{**sizes, option: np.int64(sizes[option])})
    for value in vars(made).values():
        assert not isinstance(value, np.generic)


@pytest.mark.parametrize(("module", "option"), INTEGER_OPTIONS, ids=name_of)
@pytest.mark.parametrize("value", [1.5, True, NAN, "4"], ids=str)
def test_other_types_than_integers_raise(module, option, value):
    with pytest.raises(TypeError, match=f"{option} must be an integer, got "):
        module(**{**INTEGERS[module], option: value})


@pytest.mark.parametrize(("module", "option"), INTEGER_OPTIONS, ids=name_of)
def test_an_integer_beyond_64_bits_raises(module, option):
    with pytest.raises(ValueError, match=f"{option} must be a 64-bit integer, got "):
        module(**{**INTEGERS[module], option: 2**63})


@pytest.mark.parametrize(("module", "option"), FLOAT_OPTIONS, ids=name_of)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 10**400], ids=name_of)
def test_a_number_that_is_not_finite_raises(module, option, value):
    name = "p" if option == "dropout" else option
    with pytest.raises(ValueError, match=f"{name} must be finite, got "):
        module(**{**INTEGERS.get(module, {}), option: value})


@pytest.mark.parametrize("module", [AdaptiveEmbedding, AdaptiveSoftmax])
def test_cutoffs_may_be_of_numpy(module):
    sizes = {"vocab_size": 20, "d_embed": 8, "d_proj": 8, "div_val": 2}
    made = module(**sizes, cutoffs=tuple(np.array([4, 9])))
    assert made.cutoffs == (4, 9)
    assert all(type(cutoff) is int for cutoff in made.cutoffs)
    with pytest.raises(TypeError, match="every cutoff must be an integer, got "):
        module(**sizes, cutoffs=(4.0,))


@pytest.mark.parametrize("length", [sys.maxsize, np.int64(sys.maxsize)], ids=type)
def test_the_largest_integer_is_no_limit(length):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    bounded = RelativeMultiHeadAttention(
        8, 2, 4, causal=False, window=(length, length), clamp_len=length
    )
    unbounded = RelativeMultiHeadAttention(8, 2, 4, causal=False)
    unbounded.load_state_dict(bounded.state_dict())
    assert torch.allclose(bounded(x), unbounded(x), atol=1e-6)
    first, cache = bounded.stream(x[:, :3], cache_len=length)
    assert first.shape == (2, 3, 8)
    assert cache.k.shape[2] == 3
    with pytest.raises(TypeError, match="cache_len must be an integer, got "):
        bounded.stream(x, cache_len=2.5)


@pytest.mark.parametrize(
    "module", [SinusoidalPositions, RelativeMultiHeadAttention, GroupedQueryAttention]
)
def test_a_window_is_checked_in_the_constructor(module):
    made = module(**INTEGERS[module], window=(np.int64(3), None))
    window = getattr(made, "pos_emb", made).window
    assert window == (3, None)
    assert type(window[0]) is int
    for window, error in (((1.5, 0), TypeError), ((-1, 0), ValueError), ((2**63, 0), ValueError)):
        with pytest.raises(error, match="window's left must be "):
            module(**INTEGERS[module], window=window)
