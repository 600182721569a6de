"""Generation: the seed decides, the memory carries, the filters filter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from transformer_xl.config import ModelConfig
from transformer_xl.generation import generate
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL
from transformer_xl.sampling import Sampling

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
ROUGH: dict[str, Any] = {"rtol": 0, "atol": 0.035, "check_dtype": False}
GREEDY = Sampling(temperature=0.0)
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
    written = write(model, sampling=GREEDY, segment_len=segment_len)
    model.eval()
    whole = torch.cat([PROMPT, written], dim=1)
    likeliest = model.log_probs(model(whole).hidden).argmax(-1)
    assert torch.equal(likeliest[:, PROMPT.shape[1] - 1 : -1], written)


def test_memory_stays_within_mem_len(model: TransformerXL) -> None:
    lengths = []
    model.register_forward_hook(lambda _module, _args, out: lengths.append(out.memory.length))
    write(model, n_tokens=8, segment_len=2, cached=False)
    assert lengths == [2, 4, 5, 5] + [5] * 7


@pytest.mark.parametrize(
    "options", [{"sampling": GREEDY}, {"seed": 3}, {"seed": 4, "sampling": Sampling(top_k=5)}]
)
def test_both_paths_write_one_text(model: TransformerXL, options: dict[str, Any]) -> None:
    written = write(model, n_tokens=40, **options)
    assert torch.equal(written, write(model, n_tokens=40, cached=False, **options))


def test_a_model_without_windows_writes_with_hidden_states(model: TransformerXL) -> None:
    expected = write(model, seed=1)
    object.__setattr__(model.config, "attn_type", 1)  # no config accepts it yet
    memories = []
    model.register_forward_hook(lambda _module, _args, out: memories.append(type(out.memory)))
    assert torch.equal(write(model, seed=1), expected)
    assert set(memories) == {Memory}
    object.__setattr__(model.config, "attn_type", 0)


def test_lengths_that_change_between_tokens_raise(model: TransformerXL) -> None:
    stream = generate(model, PROMPT, 5)
    next(stream)
    model.set_lengths(mem_len=3)
    with pytest.raises(ValueError, match="created with mem_len 5, the model now has 3"):
        next(stream)


def test_tokens_stream_and_the_mode_stays(model: TransformerXL) -> None:
    model.train()
    stream = generate(model, PROMPT, 1_000_000, seed=0)
    next(stream)
    assert model.training
    stream.close()
    assert model.training


def test_nothing_is_written_for_0_tokens(model: TransformerXL) -> None:
    assert list(generate(model, PROMPT, 0)) == []


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1.0), Sampling(temperature=1e-4)],
    ids=["k", "p", "min-p", "cold"],
)
def test_every_option_reaches_the_draw(model: TransformerXL, sampling: Sampling) -> None:
    """At its limit each of them leaves only the most probable token."""
    assert torch.equal(write(model, sampling=sampling, seed=0), write(model, sampling=GREEDY))


def test_first_tokens_follow_the_models_probabilities(model: TransformerXL) -> None:
    """Of one prompt in 4,000 rows, so that every row's first token is a draw of its own."""
    prompt = PROMPT[:1].expand(4000, -1)
    (first,) = generate(model, prompt, 1, seed=0)
    model.eval()
    probs = model.log_probs(model(PROMPT[:1]).hidden[:, -1])[0].exp()
    torch.testing.assert_close(first.bincount(minlength=30) / 4000, probs, **ROUGH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": -1}, "n_tokens: expected 0 or more, got -1"),
        ({"seed": 1 << 64}, "seed: expected an integer in"),
        ({"n_samples": 0}, "n_samples: expected 1 or more, got 0"),
        ({"sampling": Sampling(banned=tuple(range(30)))}, "banned: expected at most 29 tokens"),
        ({"sampling": Sampling(banned=(30,))}, r"banned: expected tokens in \[0, 30\)"),
        ({"segment_len": 0}, "segment_len: expected at least 1"),
        ({"prompts": torch.zeros(1, 0, dtype=torch.int64)}, r"prompts: expected .* got \[1, 0\]"),
        ({"prompts": torch.zeros(3, dtype=torch.int64)}, r"prompts: expected .* got \[3\]"),
        ({"prompts": []}, "prompts: expected at least one, got none"),
        ({"prompts": [PROMPT[0], PROMPT[0, :0]]}, r"prompts: expected .* torch.int64 \[0\]"),
        ({"prompts": [PROMPT[0].float()]}, r"prompts: expected int64 .* torch.float32 \[7\]"),
        ({"lengths": [7]}, r"lengths: expected 2 numbers from 1 to 7, got \[7\]"),
        ({"lengths": [0, 7]}, r"lengths: expected 2 numbers from 1 to 7, got \[0, 7\]"),
        ({"prompts": [PROMPT[0]], "lengths": [7]}, "lengths: expected None beside a list"),
    ],
)
def test_bad_input_is_named_before_anything_is_drawn(
    model: TransformerXL, options: dict[str, Any], message: str
) -> None:
    arguments = {"prompts": PROMPT, "n_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_a_plain_vocabulary_writes_too() -> None:
    plain = TransformerXL(dataclasses.replace(CONFIG, cutoffs=(), div_val=1))
    assert write(plain, sampling=Sampling(top_k=3, top_p=0.9), seed=1).shape == (2, 12)
