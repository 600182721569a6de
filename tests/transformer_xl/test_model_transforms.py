"""Modules and the whole model inside torch.func's transforms, traces and other devices."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from transformer_xl.config import ModelConfig
from transformer_xl.data import OrderedBatches, ShuffledSentenceBatches
from transformer_xl.generation import generate
from transformer_xl.model import TransformerXL
from transformer_xl.nn import AdaptiveSoftmax, RelativeMultiHeadAttention

SMALL = ModelConfig(
    vocab_size=30,
    cutoffs=(10, 20),
    div_val=2,
    n_layer=2,
    d_model=16,
    n_head=2,
    d_head=8,
    d_inner=16,
    mem_len=6,
    dropout=0.1,
    dropatt=0.1,
    init_std=0.3,
)
KINDS: dict[str, dict[str, Any]] = {
    "bins": {},
    "one_table": {"div_val": 1},
    "plain": {"div_val": 1, "cutoffs": ()},
    "sampled": {"div_val": 1, "cutoffs": (), "sample_softmax": 5},
}
TOKENS = torch.randint(0, 30, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(dataclasses.replace(SMALL, **KINDS[request.param]))


@pytest.mark.parametrize("div_val", [1, 2])
def test_per_token_gradients_of_the_adaptive_softmax(div_val: int) -> None:
    torch.manual_seed(0)
    softmax = AdaptiveSoftmax(30, 16, 16, cutoffs=(10, 20), div_val=div_val).double()
    hidden = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 9, 10, 29, -100, 20])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return softmax(x[None], y[None], reduction="sum")

    per_token = vmap(grad(loss))(hidden.detach(), target)
    (due,) = torch.autograd.grad(softmax(hidden, target, reduction="sum"), hidden)
    torch.testing.assert_close(per_token, due)
    way = torch.randn_like(hidden)
    _, slope = jvp(lambda x: softmax(x, target, reduction="sum"), (hidden.detach(),), (way,))
    torch.testing.assert_close(slope, (due * way).sum())


def test_per_row_gradients_of_the_attention_s_weights() -> None:
    torch.manual_seed(0)
    attention = RelativeMultiHeadAttention(16, 2, 8, dropatt=0.0).double()
    weights = {name: weight.detach() for name, weight in attention.named_parameters()}
    x = torch.randn(3, 5, 16, dtype=torch.float64)

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(attention, weights, (row[None],)).square().sum()

    per_row = vmap(grad(loss), (None, 0))(weights, x)
    attention(x[1:2]).square().sum().backward()
    for name, weight in attention.named_parameters():
        torch.testing.assert_close(per_row[name][1], weight.grad)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradient_of_the_model_by_torch_func(gradient_checkpointing: bool) -> None:
    torch.manual_seed(0)
    options = {"gradient_checkpointing": gradient_checkpointing}
    model = TransformerXL(dataclasses.replace(SMALL, **options)).eval()

    def loss(bias: Tensor) -> Tensor:
        return functional_call(model, {"r_w_bias": bias}, (TOKENS, None, TOKENS)).loss

    actual = grad(loss)(model.r_w_bias.detach())
    (due,) = torch.autograd.grad(model(TOKENS, None, TOKENS).loss, model.r_w_bias)
    torch.testing.assert_close(actual, due)


def test_trains_and_generates_while_another_device_is_the_default(model: TransformerXL) -> None:
    with torch.device("meta"):
        first = model(TOKENS, None, TOKENS)
        model(TOKENS, first.memory, TOKENS).loss.backward()
        drawn = list(generate(model.eval(), TOKENS, 2))
    assert first.loss.device.type == "cpu"
    assert {tokens.device.type for tokens in drawn} == {"cpu"}


def test_batches_stay_on_the_cpu_while_another_device_is_the_default() -> None:
    tokens = np.array([0, *range(1, 9), 0, 0, *range(9, 17), 0], dtype=np.uint16)
    with torch.device("meta"):
        ordered = next(iter(OrderedBatches(tokens, batch_size=2, tgt_len=3)))
        sentences = next(iter(ShuffledSentenceBatches(tokens, 0, 1, 3, seed=0)))
    for batch in (ordered, sentences):
        assert batch.reset is not None
        assert {part.device.type for part in batch} == {"cpu"}


def test_a_meta_model_computes_shapes(model: TransformerXL) -> None:
    model = model.to("meta")
    tokens = TOKENS.to("meta")
    first = model(tokens, None, tokens)
    second = model(tokens, first.memory, tokens)
    second.loss.backward()
    assert second.hidden.shape == (3, 8, 16)
    assert second.memory.hidden.shape == first.memory.hidden.shape
    assert model.eval().log_probs(second.hidden).shape == (3, 8, 30)


class _LogProbs(nn.Module):
    def __init__(self, model: TransformerXL) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.log_probs(self.model(tokens).hidden)


@pytest.mark.parametrize("clamp_len", [-1, 5])
def test_a_jit_trace_serves_other_lengths(clamp_len: int) -> None:
    torch.manual_seed(0)
    module = _LogProbs(TransformerXL(dataclasses.replace(SMALL, clamp_len=clamp_len)).eval())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks of shapes, which a trace does not repeat
        traced = torch.jit.trace(module, TOKENS)
        for tokens in (TOKENS, TOKENS.repeat(1, 2)):
            torch.testing.assert_close(traced(tokens), module(tokens))
