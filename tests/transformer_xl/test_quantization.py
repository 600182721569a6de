"""Weights in fewer bits change a score a little; protocols name them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from transformer_xl.config import ModelConfig
from transformer_xl.evaluation import evaluate
from transformer_xl.generation import generate
from transformer_xl.model import TransformerXL
from transformer_xl.quantization import Weights, convert_weights, quantize_layers, quantized_kind

TOKENS = np.random.default_rng(0).integers(0, 30, 121).astype(np.uint8)
OPTIONS = {"batch_size": 2, "tgt_len": 6, "mem_len": 12}


def built() -> TransformerXL:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=30,
        cutoffs=(10, 20),
        div_val=2,
        n_layer=2,
        d_model=32,
        n_head=2,
        d_head=16,
        d_inner=64,
        mem_len=12,
        init_std=0.3,
    )
    return TransformerXL(config).eval()


@pytest.mark.parametrize(
    ("weights", "precision"),
    [
        ("bfloat16", "bfloat16"),
        ("int8", "bfloat16, quantised linear layers (Int8Tensor)"),
    ],
)
def test_scores_and_texts_with_fewer_bits(weights: Weights, precision: str) -> None:
    if weights == "int8":
        pytest.importorskip("torchao.quantization")
    expected, model = evaluate(built(), TOKENS, **OPTIONS), built()
    convert_weights(model, weights)
    found = evaluate(model, TOKENS, **OPTIONS)
    assert found.loss != expected.loss
    assert found.loss == pytest.approx(expected.loss, rel=0.02)
    assert found.protocol == expected.protocol.removesuffix("float32") + precision
    steps = list(generate(model, torch.zeros(2, 3, dtype=torch.int64), 20, seed=1, log_probs=True))
    scores = torch.stack([step.log_probs for step in steps])
    assert scores.dtype == torch.float32, "sums of probabilities would be coarse in bfloat16"
    assert scores.isfinite().all()


def test_int8_rounds_the_linear_layers_of_the_decoder_alone() -> None:
    pytest.importorskip("torchao.quantization")
    model = built()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    quantize_layers(model)
    assert quantized_kind(model) == "Int8Tensor"
    for name, weight in model.named_parameters():
        is_product = name.startswith("layers.") and weight.dim() == 2 and "bias" not in name
        dense = weight.dequantize() if is_product else weight
        step = before[name].abs().amax(-1, keepdim=True) / 127 if is_product else 0.0
        assert ((dense - before[name]).abs() <= 0.51 * torch.as_tensor(step)).all(), name
    for convert in (quantize_layers, lambda model: convert_weights(model, "int8")):
        with pytest.raises(ValueError, match="layers that are not quantised, got weights of Int8"):
            convert(model)
    assert model.table().dtype == torch.float32, "the model stays as it was"


def test_other_weights_are_refused() -> None:
    model = built()
    with pytest.raises(ValueError, match="weights: expected bfloat16 or int8, got float16"):
        convert_weights(model, "float16")  # type: ignore[arg-type]
    assert model.table().dtype == torch.float32


def test_without_torchao_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # importing it raises
    model = built()
    with pytest.raises(ValueError, match=r"int8 needs the package torchao, .*: pip install"):
        convert_weights(model, "int8")
    assert model.table().dtype == torch.float32, "the model stays as it was"
