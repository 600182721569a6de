"""Initial parameters: the distributions of the original's training script."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from transformer_xl.config import ModelConfig
from transformer_xl.model import TransformerXL

CONFIG = ModelConfig(
    vocab_size=2000,
    cutoffs=(500, 1000),
    div_val=2,
    n_layer=2,
    d_model=64,
    n_head=8,
    d_head=32,
    d_inner=128,
)
WEIGHTS = (
    "word_emb.emb_layers.0.weight",
    "word_emb.emb_layers.2.weight",
    "layers.1.dec_attn.qkv_net.weight",
    "layers.1.dec_attn.r_net.weight",
    "layers.0.dec_attn.o_net.weight",
    "layers.0.pos_ff.CoreNet.0.weight",
    "r_w_bias",
    "r_r_bias",
    "crit.cluster_weight",
)


@pytest.fixture(scope="module")
def parameters() -> dict[str, Tensor]:
    return parameters_of(CONFIG)


def parameters_of(config: ModelConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(TransformerXL(config).named_parameters())


def assert_normal(parameter: Tensor, mean: float, std: float) -> None:
    """Mean and standard deviation within five standard errors."""
    n = parameter.numel()
    assert abs(parameter.mean().item() - mean) < 5 * std / n**0.5
    assert abs(parameter.std().item() / std - 1) < 5 / (2 * n) ** 0.5


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_normal_with_init_std(parameters: dict[str, Tensor], name: str) -> None:
    assert_normal(parameters[name], 0.0, 0.02)


@pytest.mark.parametrize("name", ["word_emb.emb_projs.0", "word_emb.emb_projs.2"])
def test_projections_are_normal_with_proj_init_std(
    parameters: dict[str, Tensor], name: str
) -> None:
    assert_normal(parameters[name], 0.0, 0.01)


def test_norm_weights_are_normal_around_1(parameters: dict[str, Tensor]) -> None:
    norms = [p for name, p in parameters.items() if name.endswith("layer_norm.weight")]
    assert len(norms) == 4
    assert_normal(torch.cat(norms), 1.0, 0.02)


def test_biases_are_zero(parameters: dict[str, Tensor]) -> None:
    biases = [p for name, p in parameters.items() if name.endswith((".bias", "cluster_bias"))]
    assert len(biases) == 2 * 4 + 3 + 1
    assert all(bias.eq(0).all() for bias in biases)


def test_uniform_weights_keep_normal_projections() -> None:
    config = dataclasses.replace(CONFIG, init="uniform", init_range=0.1)
    parameters = parameters_of(config)
    for name in WEIGHTS:
        assert parameters[name].abs().max() <= 0.1
        assert abs(parameters[name].std().item() / (0.2 / 12**0.5) - 1) < 0.15
    assert_normal(parameters["word_emb.emb_projs.0"], 0.0, 0.01)


def test_one_seed_gives_one_model() -> None:
    first, second = parameters_of(CONFIG), parameters_of(CONFIG)
    assert all(torch.equal(first[name], second[name]) for name in first)
