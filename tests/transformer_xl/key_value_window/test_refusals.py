"""A `KeyValueWindow` refuses calls that it cannot serve, and stays as it was if one raises."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.model import TransformerXL

from .window_pair import Pair, built, tokens


def test_a_call_that_raises_adds_nothing() -> None:
    pair = Pair(built(), slack=3)
    pair.read(6)
    for bad, targets in ((40, 0), (0, 40)):
        arguments = [torch.full((2, 3), value) for value in (bad, targets)]
        with torch.no_grad(), pytest.raises(IndexError):
            pair.model(arguments[0], pair.window, arguments[1])
        pair.read(3)
    assert pair.window._buffered.end == 7 + 3, "the last call that raised copied the keys before"


class OutOfMemory(TorchDispatchMode):
    """Raises MemoryError in the second selection of rows: that of layer 1."""

    def __init__(self) -> None:
        super().__init__()
        self.n_selections = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.index_select:
            self.n_selections += 1
            if self.n_selections == 2:
                raise MemoryError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call",
    [
        lambda pair: pair.model(tokens(pair.model, 2, 3), pair.window),
        lambda pair: pair.model(tokens(pair.model, 2, 20), pair.window),
        lambda pair: pair.window.select(torch.tensor([1, 0])),
        lambda pair: pair.window.select(torch.tensor([1, 0, 1])),
    ],
    ids=["full", "too-small", "same-number-of-rows", "more-rows"],
)
def test_copies_that_fail_leave_the_window_as_it_was(call: Callable[[Pair], object]) -> None:
    pair = Pair(built(), slack=5)
    for length in (6, 5):
        pair.read(length)
    with torch.no_grad(), OutOfMemory(), pytest.raises(MemoryError):
        call(pair)
    for length in (4, 1):
        pair.read(length)


def change_a_weight(model: TransformerXL) -> None:
    with torch.no_grad():
        model.layers[1].dec_attn.qkv_net.weight.add_(0)


def replace_a_weight(model: TransformerXL) -> None:
    weight = model.layers[1].dec_attn.qkv_net.weight
    weight.data = weight.data.clone()


def replace_a_layer(model: TransformerXL) -> None:
    model.layers[1].dec_attn.qkv_net = torch.nn.Linear(12, 30, bias=False).double()


def take_a_step(model: TransformerXL, **options: Any) -> None:
    optimizer = torch.optim.Adam(model.parameters(), **options)
    with torch.enable_grad():
        model(tokens(model, 1, 3), targets=tokens(model, 1, 3)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.train(), r"must be in eval\(\) mode"),
        (lambda model: model.set_lengths(mem_len=9), "created with mem_len 7, the model now has 9"),
        (lambda model: model.set_lengths(clamp_len=3), "created with clamp_len -1, .* now has 3"),
        (lambda model: model.set_lengths(same_length=True), "created with same_length False"),
        (change_a_weight, "weights of the model have changed"),
        (replace_a_weight, "weights of the model have changed"),
        (replace_a_layer, "weights of the model have changed"),
        (take_a_step, "weights of the model have changed"),
        (functools.partial(take_a_step, fused=True), "weights of the model have changed"),
        (functools.partial(take_a_step, foreach=True), "weights of the model have changed"),
        (lambda model: model.load_state_dict(model.state_dict()), "weights of the model have"),
        (lambda model: model.float(), "weights of the model have changed"),
    ],
)
def test_a_changed_model_raises(change: Callable[[TransformerXL], Any], message: str) -> None:
    model = built()
    window = KeyValueWindow.empty(model, 2)
    with torch.no_grad():
        model(tokens(model, 2, 3), window)
        change(model)
        with pytest.raises(ValueError, match=message):
            model(tokens(model, 2, 3), window)


def test_a_changed_model_gets_no_room() -> None:
    model = built()
    window = KeyValueWindow.empty(model, 2)
    model.set_lengths(clamp_len=3)
    with pytest.raises(ValueError, match="created with clamp_len -1, the model now has 3"):
        window.make_room(5)
    model.set_lengths(clamp_len=-1)
    with pytest.raises(ValueError, match=r"must be in eval\(\) mode"):
        KeyValueWindow.empty(model.train(), 2).make_room(5)
    change_a_weight(model.eval())
    with pytest.raises(ValueError, match="weights of the model have changed"):
        window.make_room(5)


def test_steps_of_another_model_change_nothing() -> None:
    pair = Pair(built())
    take_a_step(built(), fused=True)
    pair.read(3)


def test_no_hook_remains_after_the_window() -> None:
    hooks = _global_optimizer_post_hooks
    gc.collect()
    before = len(hooks)
    window = KeyValueWindow.empty(built(), 2)
    assert len(hooks) == before + 1
    del window
    gc.collect()
    assert len(hooks) == before


def test_lengths_that_are_set_and_set_back_are_the_same() -> None:
    pair = Pair(built())
    pair.read(3)
    pair.model.set_lengths(mem_len=2, clamp_len=1)
    pair.model.set_lengths(mem_len=7, clamp_len=0)
    pair.read(3)


def test_other_calls_raise() -> None:
    model = built()
    window = KeyValueWindow.empty(model, 2)
    with pytest.raises(ValueError, match="a KeyValueWindow carries no gradient"):
        model(tokens(model, 2, 3), window)
    with torch.no_grad():
        with pytest.raises(ValueError, match="expected a window of this model"):
            copy.deepcopy(model)(tokens(model, 2, 3), window)
        with pytest.raises(ValueError, match="expected a window of 3 rows, got 2"):
            model(tokens(model, 3, 3), window)
    zeros = built(first_memory="zeros")
    with torch.no_grad(), pytest.raises(ValueError, match="document_start: expected None"):
        zeros(
            tokens(zeros, 2, 3),
            KeyValueWindow.empty(zeros, 2),
            document_start=torch.zeros(2, 3, dtype=torch.bool),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": -1}, "batch_size: expected 0 or more rows, got -1"),
        ({"slack": 0}, "slack: expected 1 or more tokens, got 0"),
        ({"dtype": torch.int8}, "dtype: expected a floating dtype, got torch.int8"),
    ],
)
def test_an_impossible_window_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyValueWindow.empty(built(), **{"batch_size": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 0}, "n_tokens: expected 1 or more, got 0"),
        ({"n_tokens": 1, "segment_len": 0}, "segment_len: expected 1 or more, got 0"),
    ],
)
def test_no_room_for_less_than_a_token(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyValueWindow.empty(built(), 1).make_room(**options)


@pytest.mark.parametrize(
    ("method", "argument", "error", "message"),
    [
        ("reset", torch.tensor([1, 0]), ValueError, r"expected bool \[2\], got torch.int64 \[2\]"),
        ("reset", torch.tensor([True]), ValueError, r"expected bool \[2\], got torch.bool \[1\]"),
        (
            "select",
            torch.tensor([True, False]),
            ValueError,
            r"expected int64 \[B'\], got torch.bool",
        ),
        ("select", torch.tensor([[0]]), ValueError, r"got torch.int64 \[1, 1\]"),
        ("select", torch.tensor([0, 2]), IndexError, r"indices in \[0, 2\), got \[0, 2\]"),
        ("select", torch.tensor([-1]), IndexError, r"got \[-1\]"),
    ],
)
def test_wrong_rows_raise(method: str, argument: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(KeyValueWindow.empty(built(), 2), method)(argument)
