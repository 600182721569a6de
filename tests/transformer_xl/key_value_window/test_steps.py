"""The buffers of a `KeyValueWindow` stay the same tensors; steps have static shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.model import TransformerXL

from .window_pair import Pair, built, close, tokens


class Recorded(TorchDispatchMode):
    """The operators of a region, with the shapes of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = tuple(tuple(x.shape) for x in args if isinstance(x, Tensor))
        self.calls.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


def test_steps_have_equal_shapes_and_the_host_reads_no_position() -> None:
    model = built(torch.float32)
    window = KeyValueWindow.empty(model, 2, slack=16)
    calls = []
    with torch.no_grad():
        for _ in range(3):
            segment = tokens(model, 2, 1)
            with Recorded() as recorded:
                model(segment, window)
            calls.append(recorded.calls)
    assert calls[1] == calls[2]  # the first one projects the positions
    assert not [name for name, _ in calls[0] if "_local_scalar_dense" in name or "nonzero" in name]


def test_buffers_are_copied_only_when_they_are_full() -> None:
    model = built(torch.float32)
    window = KeyValueWindow.empty(model, 2, slack=16)
    assert window.capacity == 7 + 16
    addresses, ends = [], []
    with torch.no_grad():
        for length in (4, 12, 3, 4, 1, 1):
            model(tokens(model, 2, length), window)
            addresses.append([kv.data_ptr() for kv in window._buffered.kv])
            ends.append(window._buffered.end)
    assert addresses == addresses[:1] * 6
    assert ends == [4, 16, 19, 23, 7 + 1, 9]


def test_a_longer_segment_enlarges_the_buffers() -> None:
    pair = Pair(built(), slack=4)
    size = pair.window.n_bytes
    for length in (3, 30, 2, 30):
        pair.read(length)
    assert pair.window.capacity == 7 + 30
    assert pair.window.n_bytes > size


def test_positions_are_projected_once_per_length() -> None:
    model = built()
    calls = []
    model.layers[0].dec_attn.r_net.register_forward_hook(lambda *_: calls.append(1))
    window = KeyValueWindow.empty(model, 2)
    with torch.no_grad():
        for length in (1, 5, 1, 5, 3):
            model(tokens(model, 2, length), window)
    assert len(calls) == 2


class Compiled:
    """A compiled model, and the number of graphs that were compiled for it."""

    def __init__(self, model: TransformerXL) -> None:
        torch.compiler.reset()
        self.n_graphs = 0
        self.forward = torch.compile(model, backend=self._counted, fullgraph=True)

    def _counted(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.n_graphs += 1
        return graph.forward


@pytest.mark.slow
def test_few_compiled_graphs_serve_steps_without_room() -> None:
    pair = Pair(built(torch.float32), slack=9)
    compiled = Compiled(pair.model)
    memory = pair.memory
    with torch.no_grad():
        for _ in range(24):
            segment = tokens(pair.model, 2, 1)
            expected = pair.model(segment, memory)
            memory = expected.memory
            close(compiled.forward(segment, pair.window).hidden, expected.hidden)
    assert compiled.n_graphs <= 4


def test_one_compiled_graph_serves_all_steps_after_make_room() -> None:
    """Also after tokens were forgotten, and after kept keys were copied for more room."""
    pair = Pair(built(torch.float32, n_layer=2), slack=21)
    pair.read(4)
    compiled = Compiled(pair.model)
    memory = pair.memory
    with torch.no_grad():
        for step in range(50):
            if step in (0, 15, 30):
                buffers = pair.window._buffered
                before = int(buffers.position[0])
                assert pair.window.make_room(21) is pair.window
                assert (int(buffers.position[0]) < before) == (step > 0), "keys were not copied"
            segment = tokens(pair.model, 2, 1)
            expected = pair.model(segment, memory)
            close(compiled.forward(segment, pair.window).hidden, expected.hidden)
            if step % 10 == 9:
                pair.window.crop(1)
            else:
                memory = expected.memory
    assert compiled.n_graphs == 1
    pair.memory = memory
    for length in (1, 30, 2):  # calls that are not compiled have room of their own
        pair.read(length)


def test_other_calls_after_make_room_have_room_of_their_own() -> None:
    pair = Pair(built(), slack=9)
    for n_tokens, length in ((5, 7), (30, 3), (1, 20)):
        assert pair.window.make_room(n_tokens, segment_len=2) is pair.window
        pair.read(length)
        pair.read(1)


def test_the_host_does_nothing_in_a_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph repeats the operators of one step; here the step runs as if it were captured."""
    pair = Pair(built(), slack=9)
    pair.read(5)
    window = pair.window.make_room(6)
    monkeypatch.setattr("transformer_xl.key_value_window.is_recorded", lambda _: True)
    before = window._buffered.end, window.capacity
    for _ in range(6):
        pair.read(1)
    assert (window._buffered.end, window.capacity) == before
    monkeypatch.undo()
    for length in (4, 9):  # the latter copies the kept keys
        pair.read(length)
    monkeypatch.setattr("transformer_xl.key_value_window.is_recorded", lambda _: True)
    for _ in range(6):  # for which there is room still
        pair.read(1)


def test_capturing_without_room_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(built())
    monkeypatch.setattr("transformer_xl.key_value_window.is_recorded", lambda _: True)
    with pytest.raises(ValueError, match=r"expected a call of make_room\(n_tokens\) before"):
        pair.read(1)
