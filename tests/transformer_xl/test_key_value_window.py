"""`KeyValueWindow` computes the same as the memory of hidden states, and refuses what it cannot."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_xl.config import ModelConfig
from transformer_xl.key_value_window import KeyValueWindow, empty_memory, unsupported_reason
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL

SMALL = ModelConfig(
    vocab_size=40, n_layer=3, d_model=12, n_head=2, d_head=5, d_inner=16, mem_len=7, init_std=0.3
)
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


def built(
    dtype: torch.dtype = torch.float64, backend: str = "auto", **options: Any
) -> TransformerXL:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **options)
    return TransformerXL(config, backend=backend).to(dtype).eval()


def tokens(model: TransformerXL, rows: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, length))


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-11 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Pair:
    """A window and the memory of hidden states that it replaces, with the same rows."""

    def __init__(self, model: TransformerXL, rows: int = 2, **options: Any) -> None:
        self.model = model
        self.memory: Memory = model.init_memory(rows)
        self.window = KeyValueWindow.empty(model, rows, **options)

    @torch.no_grad()
    def read(
        self, length: int, check: Callable[[Tensor, Tensor], None] = close, **options: Any
    ) -> None:
        rows = self.window.batch_size
        segment, targets = tokens(self.model, rows, length), tokens(self.model, rows, length)
        expected = self.model(segment, self.memory, targets, reduction="none", **options)
        actual = self.model(segment, self.window, targets, reduction="none", **options)
        assert actual.memory is self.window
        check(actual.hidden, expected.hidden)
        check(actual.loss, expected.loss)
        self.memory = expected.memory


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
@given(data=st.data(), first_memory=st.sampled_from(["empty", "zeros"]))
def test_reset_rows_begin_again(data: st.DataObject, first_memory: str) -> None:
    pair = Pair(built(n_layer=2, first_memory=first_memory), 3, slack=5)
    for _ in range(5):
        rows = torch.tensor(data.draw(st.tuples(*[st.booleans()] * 3)))
        pair.memory = pair.memory.reset(rows)
        assert pair.window.reset(rows) is pair.window
        pair.read(data.draw(st.integers(1, 6)))


@settings(max_examples=30)
@given(data=st.data())
def test_documents_begin_where_document_start_is_true(data: st.DataObject) -> None:
    pair = Pair(built(n_layer=2), slack=5)
    for _ in range(4):
        length = data.draw(st.integers(0, 7))
        starts = data.draw(st.lists(st.booleans(), min_size=2 * length, max_size=2 * length))
        pair.read(length, document_start=torch.tensor(starts, dtype=torch.bool).view(2, length))


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


def test_nan_in_a_row_ends_with_its_reset() -> None:
    pair = Pair(built(), slack=20)
    pair.read(3)
    for kv in pair.window._buffered.kv:
        kv[1] = torch.nan
    rows = torch.tensor([False, True])
    pair.window.reset(rows)
    pair.memory = pair.memory.reset(rows)
    pair.read(4)


def test_empty_input() -> None:
    for rows, length in ((0, 3), (2, 0), (0, 0)):
        pair = Pair(built(), rows)
        pair.read(length)
        pair.read(length)


# ---- one buffer, static shapes


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


@pytest.mark.slow
def test_one_compiled_graph_serves_many_steps() -> None:
    torch.compiler.reset()
    pair = Pair(built(torch.float32), slack=9)
    graphs = []

    def counted(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(pair.model, backend=counted, fullgraph=True)
    memory = pair.memory
    with torch.no_grad():
        for _ in range(24):
            segment = tokens(pair.model, 2, 1)
            expected = pair.model(segment, memory)
            memory = expected.memory
            close(compiled(segment, pair.window).hidden, expected.hidden)
    assert len(graphs) <= 4


# ---- dtypes


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


# ---- what raises


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
