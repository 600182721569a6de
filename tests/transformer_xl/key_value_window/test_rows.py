"""Rows of a `KeyValueWindow` are emptied, selected and cropped, each without the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.memory import Memory

from .window_pair import Pair, built, close, tokens


@settings(max_examples=30)
@given(data=st.data(), first_memory=st.sampled_from(["empty", "zeros"]))
def test_reset_rows_begin_again(data: st.DataObject, first_memory: str) -> None:
    pair = Pair(built(n_layer=2, first_memory=first_memory), 3, slack=5)
    for _ in range(5):
        rows = torch.tensor(data.draw(st.tuples(*[st.booleans()] * 3)))
        pair.memory = pair.memory.reset(rows)
        assert pair.window.reset(rows) is pair.window
        pair.read(data.draw(st.integers(1, 6)))


@pytest.mark.parametrize("chosen", [[2, 0, 1], [1, 1, 1], [0], [2, 2, 0, 1, 1], []])
@pytest.mark.parametrize("first_memory", ["empty", "zeros"])
def test_selected_rows_continue(chosen: list[int], first_memory: str) -> None:
    pair = Pair(built(first_memory=first_memory), 3, slack=8)
    for length in (4, 6, 3):
        pair.read(length)
    rows = torch.tensor(chosen, dtype=torch.int64)
    pair.memory = Memory(pair.memory.hidden[:, rows], pair.memory.start[rows])
    assert pair.window.select(rows) is pair.window
    for length in (2, 1, 8, 1):
        pair.read(length)


class Allocated(TorchDispatchMode):
    """Bytes of the results of a region's operators that are not views of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        storages = {x.untyped_storage().data_ptr() for x in given}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in storages:
            self.n_bytes += out.nbytes
        return out


@pytest.mark.parametrize("chosen", [[2, 0, 1], [2, 2, 0, 1]])
def test_selecting_rows_needs_their_size_once(chosen: list[int]) -> None:
    window = KeyValueWindow.empty(built(mem_len=200), 3, slack=50)
    size = window.n_bytes * len(chosen) / 3
    with torch.no_grad():
        window._guard.model(tokens(window._guard.model, 3, 250), window)
    with Allocated() as allocated:
        window.select(torch.tensor(chosen))
    assert allocated.n_bytes <= 1.05 * size


def test_emptying_rows_copies_no_buffer() -> None:
    window = KeyValueWindow.empty(built(first_memory="zeros", mem_len=200), 3)
    with Allocated() as allocated:
        window.reset(torch.tensor([True, False, True]))
    assert allocated.n_bytes < 0.01 * window.n_bytes


@pytest.mark.parametrize("first_memory", ["empty", "zeros"])
def test_cropped_tokens_are_forgotten(first_memory: str) -> None:
    """Also those of a segment that was so long that older tokens had to be dropped for it."""
    pair = Pair(built(first_memory=first_memory), slack=8)
    for length, cropped in ((5, 5), (6, 2), (8, 8), (7, 0), (1, 1), (8, 3)):
        before = copy.deepcopy(pair.memory)
        pair.read(length)
        kept = tokens(pair.model, 2, length)
        pair.memory = before
        pair.window.crop(length)
        expected = pair.model(kept[:, : length - cropped], before)
        with torch.no_grad():
            pair.model(kept, pair.window)
        pair.window.crop(cropped)
        pair.memory = expected.memory
        pair.read(2)


def test_rows_at_different_positions_equal_each_row_alone() -> None:
    model = built(mem_len=6)
    window = KeyValueWindow.empty(model, 3, slack=12)
    padded, lengths = tokens(model, 3, 9), [9, 4, 7]
    more = tokens(model, 3, 20)
    with torch.no_grad():
        model(padded, window)
        window.crop(9 - torch.tensor(lengths))
        found = torch.cat([model(part, window).hidden for part in more.split(3, dim=1)], dim=1)
        for row, length in enumerate(lengths):
            memory = model(padded[[row], :length]).memory
            for begin in range(0, 20, 3):
                output = model(more[[row], begin : begin + 3], memory)
                close(found[[row], begin : begin + 3], output.hidden)
                memory = output.memory


def test_crop_raises_where_tokens_are_missing_and_changes_nothing() -> None:
    pair = Pair(built(mem_len=4), slack=6)
    pair.read(3)
    for n, message in (
        (4, r"n: expected at most the \[3, 3\] tokens of the rows, got 4"),
        (-1, "n: expected 0 or more tokens, got -1"),
        (torch.tensor([0, 4]), "n: expected at most"),
        (torch.tensor([1.0, 1.0]), r"n: expected an integer or int64 \[2\], got torch.float32"),
        (torch.tensor([1]), r"got torch.int64 \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pair.window.crop(n)
    pair.read(6)
    pair.read(3)  # drops all but the newest 4 tokens before it
    with pytest.raises(ValueError, match="without the newest 4 tokens, older ones are needed"):
        pair.window.crop(4)
    pair.window.reset(torch.tensor([False, True]))
    with pytest.raises(ValueError, match=r"at most the \[12, 0\] tokens"):
        pair.window.crop(1)
    pair.memory = pair.memory.reset(torch.tensor([False, True]))
    pair.read(2)


def test_nan_in_a_row_ends_with_its_reset() -> None:
    pair = Pair(built(), slack=20)
    pair.read(3)
    for kv in pair.window._buffered.kv:
        kv[1] = torch.nan
    rows = torch.tensor([False, True])
    pair.window.reset(rows)
    pair.memory = pair.memory.reset(rows)
    pair.read(4)
