"""Scoring and writing leave the training mode of every module as it was."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from transformer_xl.config import RunConfig
from transformer_xl.data import OrderedBatches
from transformer_xl.evaluation import Lengths, evaluate, score
from transformer_xl.generation import generate
from transformer_xl.model import TransformerXL
from transformer_xl.nn.inference import inference

TOKENS = np.random.default_rng(0).integers(0, 256, 131).astype(np.uint8)
PROMPT = torch.tensor([[1, 2, 3]])


@pytest.fixture
def model(tiny_config: RunConfig) -> TransformerXL:
    """A model in training mode whose first layer and embedding are frozen."""
    torch.manual_seed(0)
    model = TransformerXL(tiny_config.model).train()
    model.layers[0].eval()
    model.word_emb.eval()
    return model


def flags(model: TransformerXL) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_evaluation_restores_the_mode_of_each_module(model: TransformerXL) -> None:
    before = flags(model)
    assert set(before.values()) == {True, False}
    evaluate(model, TOKENS, batch_size=2, tgt_len=8, mem_len=12)
    assert flags(model) == before


def test_writing_restores_the_mode_of_each_module(model: TransformerXL) -> None:
    before = flags(model)
    for _ in generate(model, PROMPT, 3, seed=0):
        assert flags(model) == before
    assert flags(model) == before


def test_interleaved_and_abandoned_generators_restore_it_too(model: TransformerXL) -> None:
    before = flags(model)
    first, second = (generate(model, PROMPT, 5, seed=0) for _ in range(2))
    for _ in range(3):
        next(first)
        next(second)
    first.close()
    next(second)
    assert flags(model) == before
    del second
    assert flags(model) == before


def test_both_generators_write_as_one_alone(model: TransformerXL) -> None:
    alone = torch.cat(list(generate(model, PROMPT, 5, seed=0)))
    first, second = (generate(model, PROMPT, 5, seed=0) for _ in range(2))
    pairs = list(zip(first, second, strict=True))
    assert torch.equal(torch.cat([ours for ours, _ in pairs]), alone)
    assert torch.equal(torch.cat([theirs for _, theirs in pairs]), alone)


def test_training_between_two_tokens_uses_dropout(tiny_config: RunConfig) -> None:
    model = TransformerXL(tiny_config.model).train()
    model.drop.p = 0.9
    writing = generate(model, PROMPT, 2, seed=0)
    next(writing)
    with torch.no_grad():
        assert not torch.equal(model(PROMPT).hidden, model(PROMPT).hidden)


def test_an_error_restores_mode_and_lengths(model: TransformerXL) -> None:
    """The batches end with an error while the loop runs, and a forward pass fails."""
    before = flags(model)

    class Failing(OrderedBatches):
        def __iter__(self) -> Iterator[None]:
            yield next(super().__iter__())
            assert flags(model) == before
            assert model.mem_len == 12
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        score(model, Failing(TOKENS, 2, 8), Lengths(30, 9, True), 131)
    with pytest.raises(IndexError):
        evaluate(model, TOKENS.astype(np.uint16) + 300, batch_size=2, tgt_len=8, mem_len=30)
    assert flags(model) == before
    assert (model.mem_len, model.clamp_len, model.same_length) == (12, -1, False)


def test_forward_passes_run_without_dropout_and_gradient(model: TransformerXL) -> None:
    modes = []
    model.register_forward_hook(
        lambda module, _args, _out: modes.append((module.layers[1].training, module.training))
    )
    list(generate(model, PROMPT, 2))
    evaluate(model, TOKENS, batch_size=2, tgt_len=64, mem_len=0)
    assert set(modes) == {(False, False)}
    with inference(model):
        assert not torch.is_grad_enabled()
