"""Rows of a batch: prompts of different length, several samples, ends, log-probabilities."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_xl.config import ModelConfig
from transformer_xl.generation import generate
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
    init_std=0.3,
)
PROMPTS = [torch.arange(n) * 7 % 30 for n in (4, 1, 13, 6)]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "same-length": {"same_length": True},
    "zero-memory": {"first_memory": "zeros"},
    "no-memory": {"mem_len": 0},
}


@pytest.fixture
def model() -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(CONFIG).double()


def write(model: TransformerXL, prompts: Any, n_tokens: int = 12, **options: Any) -> Tensor:
    return torch.stack(list(generate(model, prompts, n_tokens, **options)), dim=1)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("segment_len", [1, 3, 5, 512])
@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_of_different_length_are_written_as_alone(
    name: str, segment_len: int, cached: bool
) -> None:
    torch.manual_seed(0)
    model = TransformerXL(dataclasses.replace(CONFIG, **VARIANTS[name])).double()
    options: dict[str, Any] = {"segment_len": segment_len, "cached": cached, "log_probs": True}
    together = list(generate(model, PROMPTS, 12, seed=3, **options))
    for row, prompt in enumerate(PROMPTS):
        # The same row number, and other texts in the other rows.
        others = [*[PROMPTS[0]] * row, prompt]
        alone = list(generate(model, others, 12, seed=3, **options))
        for ours, theirs in zip(together, alone, strict=True):
            assert ours.tokens[row] == theirs.tokens[row]
            torch.testing.assert_close(ours.log_probs[row], theirs.log_probs[row])


def test_a_padded_tensor_with_lengths_is_the_list(model: TransformerXL) -> None:
    expected = write(model, PROMPTS, seed=1)
    padded = torch.full((4, 13), 29)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    assert torch.equal(write(model, padded, lengths=[4, 1, 13, 6], seed=1), expected)


def test_samples_share_a_prompt_and_draw_apart(model: TransformerXL) -> None:
    written = write(model, PROMPTS[:2], n_samples=3, seed=1)
    assert written.shape == (6, 12)
    assert len({tuple(row) for row in written.tolist()}) == 6
    repeated = [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert torch.equal(write(model, repeated, seed=1), written)
    uncached = write(model, PROMPTS[:2], n_samples=3, seed=1, cached=False)
    assert torch.equal(uncached, written)


def test_a_prompt_is_read_once_for_all_samples(model: TransformerXL) -> None:
    read = []
    model.register_forward_pre_hook(lambda _module, args: read.append(list(args[0].shape)))
    write(model, PROMPTS[2:3], 3, n_samples=4)
    assert read == [[1, 13], [4, 1], [4, 1]]


@pytest.mark.parametrize("cached", [True, False])
def test_a_row_ends_after_a_stop_token_and_the_others_continue(
    model: TransformerXL, cached: bool
) -> None:
    plain = write(model, PROMPTS, 12, seed=2)
    counts = [int((plain == token).any(dim=1).sum()) for token in range(30)]
    stop = counts.index(2)  # two rows have it, two have not
    written = write(model, PROMPTS, 12, seed=2, stop_tokens=[stop], cached=cached)
    for ours, free in zip(written.tolist(), plain.tolist(), strict=True):
        end = free.index(stop) + 1 if stop in free else len(free)
        assert ours == free[:end] + [-1] * (12 - end)


def test_it_ends_when_all_rows_have_ended(model: TransformerXL) -> None:
    plain = write(model, PROMPTS, 5, seed=2)
    steps = list(generate(model, PROMPTS, 1000, seed=2, stop_tokens=plain[:, :3].flatten()))
    assert len(steps) <= 3
    assert len(list(generate(model, PROMPTS, 1000, stop_tokens=range(30)))) == 1


def test_finished_ends_rows(model: TransformerXL) -> None:
    calls = []

    def finished(tokens: Tensor) -> Tensor:
        calls.append(tokens)
        return torch.arange(4) < len(calls)  # one more row after each step

    written = write(model, PROMPTS, 9, seed=2, finished=finished)
    assert torch.equal(torch.stack(calls, dim=1), written)
    assert (written >= 0).sum(1).tolist() == [1, 2, 3, 4]
    plain = write(model, PROMPTS, 4, seed=2)
    assert torch.equal(written.where(written >= 0, plain), plain)


def test_log_probabilities_are_those_of_the_model(model: TransformerXL) -> None:
    """Of the drawn tokens, whatever changes the distribution that they are drawn from."""
    sampling = Sampling(temperature=2.0, top_k=9, repetition_penalty=1.5, banned=(3,))
    long = TransformerXL(dataclasses.replace(CONFIG, mem_len=99)).double()
    options: dict[str, Any] = {"sampling": sampling, "seed": 4, "log_probs": True}
    drawn = list(generate(long, PROMPTS, 8, stop_tokens=[5], **options))
    tokens = torch.stack([step.tokens for step in drawn], dim=1)
    scores = torch.stack([step.log_probs for step in drawn], dim=1)
    assert torch.equal(scores.isnan(), tokens < 0)
    for row, prompt in enumerate(PROMPTS):
        text = tokens[row][tokens[row] >= 0]
        whole = torch.cat([prompt, text])
        expected = long.eval().log_probs(long(whole[None]).hidden)[0, len(prompt) - 1 : -1]
        expected = expected.gather(1, text[:, None])[:, 0]
        torch.testing.assert_close(scores[row, : len(text)], expected)


def test_the_penalty_counts_the_prompt_and_the_text(model: TransformerXL) -> None:
    """A large penalty, greedy: no token twice until all tokens have been seen."""
    sampling = Sampling(temperature=0.0, repetition_penalty=1e6)
    prompt = torch.arange(10)
    (text,) = write(model, [prompt], 20, sampling=sampling).tolist()
    assert sorted(text) == list(range(10, 30))
    rows = write(model, [torch.tensor([1, 2]), prompt], 20, sampling=sampling).tolist()
    assert rows[1] == text
    assert set(rows[0]).isdisjoint({1, 2})


def test_banned_tokens_are_not_drawn(model: TransformerXL) -> None:
    banned = tuple(range(1, 30))
    written = write(model, PROMPTS, 6, sampling=Sampling(banned=banned), seed=1)
    assert written.unique().tolist() == [0]


def test_diverged_models_raise(model: TransformerXL) -> None:
    with torch.no_grad():
        next(model.layers[1].parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="log_probs: expected finite numbers"):
        write(model, PROMPTS)
