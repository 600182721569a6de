"""One decoder layer in evaluation: a segment after a full memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor

from benchmarks.cases import OURS, WrongResultError
from benchmarks.measure import Timed, stopwatch
from benchmarks.peers.hf import HuggingFaceLayer
from transformer_xl.config import ModelConfig
from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL
from transformer_xl.nn import DecoderLayer

HF, HF_BF16, HIDDEN_STATES = "hf", "hf-bf16", "hidden-states"

# The largest relative error of an output, by Frobenius norm.
GATE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A layer of a model and its segment.

    Attributes:
        config: of a model with one layer; `mem_len`, `clamp_len` and `same_length` are those of
            the evaluation. With `same_length` every token attends to `mem_len` tokens.
        tgt_len: tokens of the segment. The batch has one row.
    """

    name: str
    config: ModelConfig
    tgt_len: int

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The hidden states [1, mem_len, d_model] of the memory and [1, tgt_len, d_model]."""
        generator = torch.Generator().manual_seed(0)
        lengths = [self.config.mem_len, self.tgt_len]
        x = torch.randn(1, sum(lengths), self.config.d_model, generator=generator)
        memory, segment = x.split(lengths, dim=1)
        return memory.contiguous(), segment.contiguous()

    def tiny(self) -> LayerShape:
        config = dataclasses.replace(self.config, d_inner=64, mem_len=24, clamp_len=10)
        return dataclasses.replace(self, config=config, tgt_len=16)

    def flop(self, name: str) -> int:
        """Floating-point operations of the products that a contender computes.

        `OURS` projects new tokens only; each attended pair costs 6·d_head per head (key, position
        and value), beyond `clamp_len` too.
        """
        c, T = self.config, self.tgt_len
        n_keys, width = c.mem_len + T, c.n_head * c.d_head
        weight = 2 * c.d_model * width  # for each row of a product with a weight of the attention
        feed_forward = 4 * T * c.d_model * c.d_inner
        if name in (HF, HF_BF16):  # queries of the memory too, a row of r for each key
            projections = 4 * n_keys * weight + T * weight
            return projections + feed_forward + 6 * T * n_keys * width
        attention = 6 * T * c.mem_len * width
        if name == OURS:
            return 4 * T * weight + feed_forward + attention
        n_distances = min(c.clamp_len + 1, n_keys)
        return (2 * n_keys + 2 * T + n_distances) * weight + feed_forward + attention


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """Evaluation of a segment by one layer, ours with a `KeyValueWindow`.

    bfloat16 means autocast. Peer `hf` always computes in float32; `hf-bf16` under autocast too.
    The yardstick `hidden-states` is ours with a `Memory`, which is projected at each segment.
    """

    shape: LayerShape
    dtype: torch.dtype
    device: ClassVar[str] = "cpu"
    bytes_read: ClassVar[None] = None

    @property
    def name(self) -> str:
        return f"model/{self.shape.name}/{str(self.dtype).removeprefix('torch.')}/evaluate_layer"

    @property
    def peers(self) -> tuple[str, ...]:
        return (HF,) if self.dtype == torch.float32 else (HF, HF_BF16)

    @property
    def yardsticks(self) -> tuple[str, ...]:
        return (HIDDEN_STATES,)

    @property
    def in_process(self) -> tuple[str, ...]:
        return (OURS, HIDDEN_STATES)

    @property
    def flop(self) -> int:
        return self.shape.flop(OURS)

    @property
    def tokens(self) -> int:
        return self.shape.tgt_len

    def tiny(self) -> LayerCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        if name in (HF, HF_BF16):
            with self._worker() as worker:
                yield lambda: worker.ask("evaluate_layer", bf16=name == HF_BF16)["seconds"]
        else:
            yield stopwatch(self._run(name).evaluate)

    def check(self, name: str) -> None:
        if name in (HF, HF_BF16):
            with self._worker() as worker:
                out = worker.output(bf16=name == HF_BF16)
        else:
            out = self._run(name).evaluate()
        right = expected(self.shape)
        error = float((out.double() - right).norm() / right.norm())
        if not error <= GATE[torch.float32 if name == HF else self.dtype]:  # NaN is an error too
            raise WrongResultError(f"{self.name}: {name} is off by {error:.1e} of its norm")

    def _run(self, name: str) -> LayerRun:
        return LayerRun(self.shape, self.dtype, cached=name == OURS)

    def _worker(self) -> HuggingFaceLayer:
        model = layer_model(self.shape)
        return HuggingFaceLayer(model, self.shape.config, *self.shape.tensors())


class LayerRun:
    """Our layer, called as the model calls it.

    `cached`: with a `KeyValueWindow`, which continues after each call; else with a `Memory`, of
    which the updated copy is dropped, so that every call computes the same.
    """

    def __init__(
        self, shape: LayerShape, dtype: torch.dtype, *, cached: bool, backend: str = "auto"
    ) -> None:
        self._model = layer_model(shape, backend)
        if dtype == torch.float64:
            self._model.double()
        self._autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        weights = self._model.table().dtype
        self._hidden, self._x = (x.to(weights) for x in shape.tensors())
        (layer,) = self._model.layers
        self._layer = cast(DecoderLayer, layer)
        self._biases = (self._model.r_w_bias, self._model.r_r_bias)
        self.evaluate = self._evaluate_window if cached else self._evaluate_memory
        if cached:
            with self._autocast, torch.no_grad():
                self._window = KeyValueWindow.empty(self._model, 1)
                for piece in self._hidden.split(shape.tgt_len, dim=1):
                    self._extend(piece)
        else:
            self._memory = Memory(self._hidden[None], torch.zeros(1, dtype=torch.int64))
            n_keys = shape.config.mem_len + shape.tgt_len
            self._positions = self._model.pos_emb(
                shape.tgt_len, n_keys, dtype=weights, device=self._x.device
            )

    def _evaluate_window(self) -> Tensor:
        with self._autocast, torch.no_grad():
            return self._extend(self._x)

    def _extend(self, x: Tensor) -> Tensor:
        (layer_window,) = self._window.begin(self._model, x)
        out: Tensor = self._layer(x, layer_window, None, *self._biases)
        self._window.advance(x.shape[1])
        return out

    def _evaluate_memory(self) -> Tensor:
        with self._autocast, torch.no_grad():
            (hidden,) = self._memory.hidden
            out: Tensor = self._layer(
                self._x, hidden, self._positions, *self._biases, self._memory.start
            )
            self._memory.update([self._x], self._model.mem_len)
            return out


def layer_model(shape: LayerShape, backend: str = "auto") -> TransformerXL:
    """The model whose only layer is measured."""
    torch.manual_seed(0)
    return TransformerXL(shape.config, backend=backend).eval()


@functools.lru_cache(maxsize=1)
def expected(shape: LayerShape) -> Tensor:
    """The output [1, tgt_len, d_model] of the specification in float64, with a `Memory`."""
    return LayerRun(shape, torch.float64, cached=False, backend="reference").evaluate()
