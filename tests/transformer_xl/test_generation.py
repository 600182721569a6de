"""Generation: the seed decides, the memory carries, the filters filter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from transformer_xl.config import ModelConfig
from transformer_xl.generation import Sampling, generate
from transformer_xl.model import TransformerXL

CONFIG = ModelConfig(
    vocab_size=30,
    cutoffs=(8, 20),
    div_val=2,
    n_layer=2,
    d_model=16,
    n_head=2,
    d_head=8,
    d_inner=16,
    mem_len=5,
    same_length=True,
    init_std=0.3,
)
PROMPT = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [29, 3, 5, 7, 11, 13, 17]])


@pytest.fixture
def model() -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(CONFIG).double()


def write(model: TransformerXL, n_tokens: int = 12, **options: Any) -> torch.Tensor:
    return torch.stack(list(generate(model, PROMPT, n_tokens, **options)), dim=1)


def test_one_seed_writes_one_text(model: TransformerXL) -> None:
    first = write(model, seed=5)
    torch.rand(7)
    assert torch.equal(first, write(model, seed=5))
    assert not torch.equal(first, write(model, seed=6))
    own = torch.Generator().manual_seed(5)
    assert torch.equal(first, write(model, generator=own))
    assert first.shape == (2, 12)
    assert first.dtype == torch.int64


def test_the_global_generator_is_left_alone(model: TransformerXL) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    write(model)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("segment_len", [1, 3, 512])
def test_one_by_one_has_the_probabilities_of_one_pass(
    model: TransformerXL, segment_len: int
) -> None:
    written = write(model, temperature=0, segment_len=segment_len)
    model.eval()
    whole = torch.cat([PROMPT, written], dim=1)
    likeliest = model.log_probs(model(whole).hidden).argmax(-1)
    assert torch.equal(likeliest[:, PROMPT.shape[1] - 1 : -1], written)


def test_memory_stays_within_mem_len(model: TransformerXL) -> None:
    lengths = []
    model.register_forward_hook(lambda _module, _args, out: lengths.append(out.memory.length))
    write(model, n_tokens=8, segment_len=2)
    assert lengths == [2, 4, 5, 5] + [5] * 7


def test_tokens_stream_and_the_mode_comes_back(model: TransformerXL) -> None:
    model.train()
    stream = generate(model, PROMPT, 1_000_000, seed=0)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training


def test_nothing_is_written_for_0_tokens(model: TransformerXL) -> None:
    assert list(generate(model, PROMPT, 0)) == []


def test_temperature_sharpens_or_flattens() -> None:
    log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    warm = Sampling(temperature=2.0).probs(log_probs)
    expected = torch.tensor([[0.5, 0.3, 0.2]]).sqrt()
    torch.testing.assert_close(warm, expected / expected.sum())
    torch.testing.assert_close(Sampling().probs(log_probs), log_probs.exp())


def test_top_k_keeps_the_k_most_probable() -> None:
    log_probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    expected = torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]])
    torch.testing.assert_close(Sampling(top_k=2).probs(log_probs), expected)
    torch.testing.assert_close(Sampling(top_k=9).probs(log_probs), log_probs.exp())


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.45, [1, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_p(top_p: float, kept: list[int]) -> None:
    log_probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    probs = Sampling(top_p=top_p).probs(log_probs)
    assert probs[0].nonzero().flatten().tolist() == kept
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0))


def test_draws_follow_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    draws = Sampling().draw(probs.log().expand(20_000, 4), generator)
    torch.testing.assert_close(draws.bincount() / 20_000, probs, rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": -1}, "n_tokens: expected 0 or more, got -1"),
        ({"temperature": -0.1}, "temperature: expected 0 or more, got -0.1"),
        ({"top_k": 0}, "top_k: expected None or at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: expected None or a probability in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p: expected"),
        ({"segment_len": 0}, "segment_len: expected at least 1"),
        ({"seed": 1, "generator": torch.Generator()}, "seed: expected None beside a generator"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, r"prompt: expected .* got \[1, 0\]"),
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, r"prompt: expected .* got \[3\]"),
    ],
)
def test_bad_input_is_named_before_anything_is_drawn(
    model: TransformerXL, options: dict[str, Any], message: str
) -> None:
    arguments = {"prompt": PROMPT, "n_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_a_plain_vocabulary_writes_too() -> None:
    plain = TransformerXL(dataclasses.replace(CONFIG, cutoffs=(), div_val=1))
    assert write(plain, top_k=3, top_p=0.9, seed=1).shape == (2, 12)
