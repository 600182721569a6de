"""`KeyValueWindow` computes the same as the memory of hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_xl.key_value_window import KeyValueWindow, empty_memory, unsupported_reason
from transformer_xl.memory import Memory

from .window_pair import Pair, built, tokens

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied-biases": {"untie_r": True},
    "pre-lnorm": {"pre_lnorm": True, "final_lnorm": True},
    "zero-memory": {"first_memory": "zeros", "pre_lnorm": True},
    "same-length": {"same_length": True, "clamp_len": 4},
    "same-length-plus-one": {"same_length": True, "same_length_keys": "mem_len+1"},
    "long-memory": {"mem_len": 100},
    "no-memory": {"mem_len": 0},
    "bins": {"cutoffs": (10, 25), "div_val": 2, "dropout": 0.3, "dropatt": 0.3},
}
SEGMENTS = [5, 4, 8, 1, 1, 3, 1, 1, 9, 0, 2]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_losses_are_those_of_the_memory(name: str, backend: str) -> None:
    pair = Pair(built(backend=backend, **ARCHITECTURES[name]), slack=6)
    for length in SEGMENTS:
        pair.read(length)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    slack=st.integers(1, 12),
    mem_len=st.integers(1, 14),
    clamp_len=st.integers(-1, 14),
    same_length=st.booleans(),
    same_length_keys=st.sampled_from(["mem_len", "mem_len+1"]),
    first_memory=st.sampled_from(["empty", "zeros"]),
    pre_lnorm=st.booleans(),
    untie_r=st.booleans(),
)
def test_all_lengths_give_the_numbers_of_the_memory(
    lengths: list[int], slack: int, **options: Any
) -> None:
    pair = Pair(built(n_layer=2, **options), slack=slack)
    for length in lengths:
        pair.read(length)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_and_autocast(name: str) -> None:
    pair = Pair(built(torch.float32, **ARCHITECTURES[name]), slack=6)
    for length in SEGMENTS:
        pair.read(length)

    def rough(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)

    with torch.autocast("cpu", torch.bfloat16):
        pair = Pair(pair.model, slack=6)
        assert pair.window.dtype == torch.bfloat16
        for length in SEGMENTS:
            pair.read(length, rough)


@settings(max_examples=30)
@given(data=st.data())
def test_documents_begin_where_document_start_is_true(data: st.DataObject) -> None:
    pair = Pair(built(n_layer=2), slack=5)
    for _ in range(4):
        length = data.draw(st.integers(0, 7))
        starts = data.draw(st.lists(st.booleans(), min_size=2 * length, max_size=2 * length))
        pair.read(length, document_start=torch.tensor(starts, dtype=torch.bool).view(2, length))


def test_empty_input() -> None:
    for rows, length in ((0, 3), (2, 0), (0, 0)):
        pair = Pair(built(), rows)
        pair.read(length)
        pair.read(length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_window_of_another_dtype_returns_the_dtype_of_the_model(
    dtype: torch.dtype, model_dtype: torch.dtype
) -> None:
    pair = Pair(built(model_dtype, init_std=0.1), dtype=dtype)
    assert pair.window.dtype == dtype

    def rough(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)

    for length in (5, 3, 1):
        pair.read(length, rough)


def test_a_window_made_in_inference_mode_is_used_outside_of_it() -> None:
    model = built()
    with torch.inference_mode():
        window = KeyValueWindow.empty(model, 2, slack=3)
        model(tokens(model, 2, 9), window)
        window.select(torch.tensor([0, 1, 1]))
    with torch.no_grad():
        model(tokens(model, 3, 5), window)
        window.reset(torch.ones(3, dtype=torch.bool))


def test_a_model_without_windows_has_a_memory_instead() -> None:
    model = built()
    assert isinstance(empty_memory(model, 2), KeyValueWindow)
    assert isinstance(empty_memory(model, 2, cached=False), Memory)
    object.__setattr__(model.config, "attn_type", 1)  # no config accepts it yet
    assert unsupported_reason(model) == "attn_type 1"
    assert isinstance(empty_memory(model, 2), Memory)
    with pytest.raises(
        ValueError, match="expected one that a KeyValueWindow serves, got attn_type 1"
    ):
        KeyValueWindow.empty(model, 2)
