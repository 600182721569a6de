"""Hugging Face's InklingAttention: the part between the projections, the whole layer, decoding."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import room
from benchmarks.cases import OURS
from benchmarks.cases.dropins import HF, DropInCase, patched_if, some_rows, without_gradients
from benchmarks.cases.rel_attention import CONTENT_FLOP, POSITION_FLOP, Pass
from benchmarks.inputs import AttentionShape
from benchmarks.measure import Timed
from benchmarks.peers import inkling_layer
from benchmarks.peers.inkling_layer import CoreInputs

GATE = 1e-5  # relative error by Frobenius norm
CORE, LAYER = "attention", "layer"
DIRECTIONS: tuple[Pass, Pass] = ("forward", "forward+backward")
CHECKED_TOKENS = 1536  # of a whole layer, compared with the unpatched class in float64
CHECKED_KEY_HEADS = 2  # gradients: the float64 scores of all heads would need gigabytes


@dataclasses.dataclass(frozen=True)
class InklingCase(DropInCase):
    """One attention layer on a text; `part` is "attention" (no projections) or "layer"."""

    shape: AttentionShape
    part: str
    direction: Pass = "forward"

    @property
    def name(self) -> str:
        return f"dropin/{self.shape.name}/float32/{self.direction}"

    @property
    def flop(self) -> int | None:  # type: ignore[override]
        if self.part == LAYER:
            return None
        shape, direction = self.shape, self.direction
        assert shape.d_rel
        position = POSITION_FLOP[direction] * shape.d_rel * shape.position_pairs
        return CONTENT_FLOP[direction] * shape.D * shape.attended_pairs + position

    def run(self, name: str) -> Callable[[], object]:
        shape = self.shape
        mask = None if name == OURS else inkling_layer.window_mask(shape)
        if self.part == LAYER:
            module, x = inkling_layer.attention(shape), _hidden(shape)
            patched_if(name == OURS, module)
            return without_gradients(lambda: module(x, mask)[0])
        inputs = inkling_layer.core_inputs(shape, requires_grad=self.direction != "forward")
        attend = _core(shape, inputs, mask, is_patched=name == OURS)
        if self.direction == "forward":
            return without_gradients(attend)
        dout = _dout(shape)
        return lambda: torch.autograd.grad(attend(), inputs.leaves(), dout)

    def n_bytes(self, name: str) -> int:
        """Hugging Face's bias, its masked copies and the probabilities of its gradients."""
        shape = self.shape
        inputs = 4 * shape.Tq * (10 * shape.H * shape.D) + 4 * 4 * (shape.H * shape.D) ** 2
        n_matrix = 3 if self.direction == "forward" else 6
        matrices = n_matrix * 4 * shape.H * shape.Tq * shape.n_keys
        return inputs + (matrices if name == HF else 0)

    def check_result(self, name: str) -> None:
        """Output: some queries by their formula; layers and gradients: the class in float64."""
        if self.direction != "forward":
            self._check_gradients(name)
            return
        if self.part == LAYER:
            short = dataclasses.replace(self, shape=_cut(self.shape, CHECKED_TOKENS))
            self.compare(name, short.run(name)(), _layer_reference(short.shape), GATE)
            if name != OURS:
                return
        rows, inputs = some_rows(self.shape.Tq), inkling_layer.core_inputs(self.shape)
        core = dataclasses.replace(self, part=CORE)
        actual = core.run(name)()[0, rows]
        self.compare(name, actual, inkling_layer.core_rows(self.shape, inputs, rows), GATE)

    def tiny(self) -> InklingCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    def _check_gradients(self, name: str) -> None:
        shape = self.shape.with_key_heads(min(self.shape.n_key_heads, CHECKED_KEY_HEADS))
        inputs, dout = inkling_layer.core_inputs(shape, requires_grad=True), _dout(shape)
        mask = None if name == OURS else inkling_layer.window_mask(shape)
        out = _core(shape, inputs, mask, is_patched=name == OURS)()
        results = (out.detach(), *torch.autograd.grad(out, inputs.leaves(), dout))
        for actual, expected in zip(results, _gradients_reference(shape), strict=True):
            self.compare(name, actual, expected, GATE)


@dataclasses.dataclass(frozen=True)
class DecodeCase(DropInCase):
    """One token after the keys of a cache, between the projections of a global layer.

    Attributes:
        shape: Tq is 1, and Tm the number of keys before.
        grows: the cache is transformers' DynamicCache, to which every run adds a token; otherwise
            its keys and values are given and stay the same.
    """

    shape: AttentionShape
    grows: bool

    N_SETS = 8  # of keys and values in turn, so that they do not stay in the processor's caches
    N_STEPS = 64  # timed tokens of a cache before it is shortened to Tm keys again

    @property
    def name(self) -> str:
        return f"dropin/{self.shape.name}/float32/{self.direction}"

    @property
    def bytes_read(self) -> int | None:  # type: ignore[override]
        """Keys and values once; a growing cache is also written."""
        return None if self.grows else self._state_bytes

    @property
    def _state_bytes(self) -> int:
        """Of all keys and values, float32."""
        shape = self.shape
        return 2 * 4 * shape.B * shape.n_key_heads * shape.n_keys * shape.D

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        """Yields a stopwatch of single tokens.

        The first token after each `shorten` is not timed: a patched class then copies the cache to
        buffers with room for further tokens.
        """
        room.require(self.n_bytes(name))
        sets = [self._prepared(name, seed) for seed in range(self.N_SETS)]
        runs = itertools.count()

        def timed() -> float:
            step, i_set = divmod(next(runs), self.N_SETS)
            attend, shorten = sets[i_set]
            if step % self.N_STEPS == 0:
                shorten()
                attend()
            started = time.perf_counter()
            attend()
            return time.perf_counter() - started

        yield timed

    def n_bytes(self, name: str) -> int:
        """All sets of keys and values, and the parts of which they are made."""
        return 3 * self.N_SETS * self._state_bytes

    def check_result(self, name: str) -> None:
        """By the formula, from the keys and values that the cache returns."""
        attend, _ = self._prepared(name, seed=0)
        inputs, states = self._states(seed=0)
        rows = torch.tensor([self.shape.n_keys - 1])
        expected = inkling_layer.core_rows(self.shape, inputs, rows, states)
        self.compare(name, attend()[0], expected, GATE)

    def tiny(self) -> DecodeCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    def _states(self, seed: int) -> tuple[CoreInputs, tuple[Tensor, Tensor]]:
        """The token's tensors, and all keys and values with its own at the end."""
        shape = self.shape
        inputs = inkling_layer.core_inputs(shape, seed=seed)
        before = dataclasses.replace(shape, Tq=shape.Tm, Tm=0)
        past = inkling_layer.core_inputs(before, seed=seed + self.N_SETS)
        heads = (shape.B, -1, shape.n_key_heads, shape.D)
        pairs = ((past.k, inputs.k), (past.v, inputs.v))
        keys, values = (torch.cat(x, dim=1).view(heads).transpose(1, 2) for x in pairs)
        return inputs, (keys.contiguous(), values.contiguous())

    def _prepared(self, name: str, seed: int) -> tuple[Callable[[], Tensor], Callable[[], object]]:
        """The attention after a cache of Tm keys; a function that shortens the cache to them."""
        inputs, states = self._states(seed)
        module = patched_if(name == OURS, inkling_layer.core(self.shape, inputs))
        cache: Any = inkling_layer.FixedCache(*states)
        if self.grows:
            cache = inkling_layer.dynamic_cache(self.shape)
            cache.update(*(x[:, :, :-1].contiguous() for x in states), 0)
            (layer,) = cache.layers
            past = {"keys": layer.keys, "values": layer.values}
        attend = without_gradients(lambda: module(inputs.q, None, cache=cache)[0])
        return attend, lambda: vars(layer).update(past) if self.grows else None


def _core(
    shape: AttentionShape, inputs: CoreInputs, mask: Tensor | None, *, is_patched: bool
) -> Callable[[], Tensor]:
    module = patched_if(is_patched, inkling_layer.core(shape, inputs))
    return lambda: module(inputs.q, mask)[0]


def _cut(shape: AttentionShape, Tq: int) -> AttentionShape:
    return dataclasses.replace(shape, Tq=min(shape.Tq, Tq))


def _hidden(shape: AttentionShape) -> Tensor:
    return inkling_layer.core_inputs(shape).q


def _dout(shape: AttentionShape) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape.B, shape.Tq, shape.H * shape.D, generator=generator)


@functools.lru_cache(maxsize=1)
def _layer_reference(shape: AttentionShape) -> Tensor:
    module = copy.deepcopy(inkling_layer.attention(shape)).double()
    with torch.no_grad():
        out: Tensor = module(_hidden(shape).double(), inkling_layer.window_mask(shape))[0]
    return out


@functools.lru_cache(maxsize=1)
def _gradients_reference(shape: AttentionShape) -> tuple[Tensor, ...]:
    inputs = inkling_layer.core_inputs(shape, requires_grad=True).convert(torch.float64)
    out = _core(shape, inputs, inkling_layer.window_mask(shape), is_patched=False)()
    return out.detach(), *torch.autograd.grad(out, inputs.leaves(), _dout(shape).double())


def inkling_cases(kinds: Mapping[str, AttentionShape]) -> list[DropInCase]:
    """The layers of a model by kind ("global", "sliding"), and decoding in a global one."""

    def shape(kind: str, part: str, Tq: int) -> AttentionShape:
        return dataclasses.replace(kinds[kind], name=f"inkling_{part}_{kind}_{Tq}", Tq=Tq)

    attentions = [
        InklingCase(shape(kind, CORE, Tq), CORE, direction)
        for kind in kinds
        for Tq in (2048, 4096, 8192, 16384, 32768)
        for direction in DIRECTIONS[: 2 if Tq == 2048 else 1]
    ]
    layers = [
        InklingCase(shape(kind, LAYER, Tq), LAYER) for kind in kinds for Tq in (2048, 4096, 32768)
    ]
    decoded = dataclasses.replace(kinds["global"], Tq=1, Tm=4096)
    names = {"inkling_decode_4096": False, "inkling_decode_4096_dynamic": True}
    decodes = [
        DecodeCase(dataclasses.replace(decoded, name=name), grows) for name, grows in names.items()
    ]
    return [*decodes, *attentions, *layers]
