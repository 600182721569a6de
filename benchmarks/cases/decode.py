"""Decoding: one token of each row by a whole model, with its softmax and sampling."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from benchmarks.cases import PeerUnavailableError, WrongResultError
from benchmarks.measure import Timed, stopwatch
from benchmarks.peers.hf import HuggingFaceDecoder
from transformer_xl.config import ModelConfig
from transformer_xl.generation import generate
from transformer_xl.model import TransformerXL
from transformer_xl.quantization import convert_weights
from transformer_xl.reader import Reader

Weights = Literal["float32", "bfloat16", "int8"]  # int8: of the decoder layers, others bfloat16
HF = "hf"
# Bytes of a number: in the layers' weights; in other weights, keys, values and positions.
N_BYTES = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1, 2)}
# Largest relative error of the centred log-probabilities, by Frobenius norm.
GATE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 5e-2}
CHECKED_LAYERS = 2
SEGMENT = 512  # tokens of a prompt that are read at a time
MANY = 1 << 40  # tokens: the text has no end


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """A model with a full memory of `config.mem_len` tokens, and the rows that it writes."""

    name: str
    config: ModelConfig
    batch_size: int

    def prompts(self) -> Tensor:
        """int64 [batch_size, mem_len + 1]: the tokens that fill the memory, and the last one."""
        generator = torch.Generator().manual_seed(0)
        size = (self.batch_size, self.config.mem_len + 1)
        return torch.randint(self.config.vocab_size, size, generator=generator)

    def tiny(self) -> DecodeShape:
        config = dataclasses.replace(
            self.config, d_inner=64, n_layer=2, mem_len=min(self.config.mem_len, 24)
        )
        return dataclasses.replace(self, config=config)

    def checked(self) -> DecodeShape:
        """The same with fewer layers, for a comparison in float64."""
        config = dataclasses.replace(self.config, n_layer=CHECKED_LAYERS)
        return dataclasses.replace(self, config=config)

    def bytes_read(self, weights: Weights) -> int:
        """Of a step: each weight of the layers and of the softmax once, the keys and values that
        each row attends to, and the projected position of each distance once."""
        config, (layer_bytes, other_bytes) = self.config, N_BYTES[weights]
        n_layer_weights, n_softmax_weights = _n_weights(config)
        n_keys = config.mem_len
        if not (config.same_length and config.same_length_keys == "mem_len"):
            n_keys += 1  # the token itself
        n_distances = n_keys if config.clamp_len <= 0 else min(n_keys, config.clamp_len + 1)
        n_rows = 2 * self.batch_size * n_keys + n_distances
        n_cached = config.n_layer * config.n_head * config.d_head * n_rows
        return layer_bytes * n_layer_weights + other_bytes * (n_softmax_weights + n_cached)


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """The next token of `generate`. Weights other than float32 have a cache in bfloat16.

    Peer `hf` decodes with its memory of hidden states, in float32, and samples.
    """

    shape: DecodeShape
    weights: Weights
    device: ClassVar[str] = "cpu"
    yardsticks: ClassVar[tuple[str, ...]] = ()
    in_process: ClassVar[tuple[str, ...]] = ()  # weights and cache are all of the memory
    flop: ClassVar[None] = None

    @property
    def name(self) -> str:
        return f"decode/{self.shape.name}/{self.weights}/step"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.weights == "float32" else torch.bfloat16

    @property
    def peers(self) -> tuple[str, ...]:
        return (HF,) if self.shape.config.mem_len > 0 else ()

    @property
    def bytes_read(self) -> int:
        return self.shape.bytes_read(self.weights)

    @property
    def tokens(self) -> int:
        return self.shape.batch_size

    def tiny(self) -> DecodeCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        if name == HF:
            with _hugging_face(self.shape) as worker:
                yield lambda: worker.ask("step")["seconds"]
            return
        prompts = self.shape.prompts()
        tokens = generate(self._model(self.shape), prompts, MANY, seed=0, segment_len=SEGMENT)
        next(tokens)  # reads the prompts
        yield stopwatch(lambda: next(tokens))

    def check(self, name: str) -> None:
        """The log-probabilities of the token after a prompt, by a model with fewer layers."""
        shape = self.shape.checked()
        if name == HF:
            with _hugging_face(shape) as worker:
                found = worker.log_probs()
        else:
            found = _log_probs(self._model(shape), shape, cached=True)
        expected = _expected(shape)
        error = float((_centred(found) - expected).norm() / expected.norm())
        allowed = GATE["float32" if name == HF else self.weights]
        if not error <= allowed:  # NaN is an error too
            raise WrongResultError(
                f"{self.name}: {name} is off by {error:.1e} of its norm; {allowed:.0e} is allowed"
            )

    def _model(self, shape: DecodeShape) -> TransformerXL:
        model = _float32_model(shape)
        if self.weights != "float32":
            try:
                convert_weights(model, self.weights)
            except ValueError as error:  # without torchao
                raise PeerUnavailableError(str(error)) from error
        return model


def _float32_model(shape: DecodeShape, backend: str = "auto") -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(shape.config, backend=backend).eval()


def _hugging_face(shape: DecodeShape) -> HuggingFaceDecoder:
    *segments, last = shape.prompts().split([*_segments(shape), 1], dim=1)
    return HuggingFaceDecoder(_float32_model(shape), shape.config, segments, last)


def _segments(shape: DecodeShape) -> list[int]:
    """The lengths in which the contenders read a prompt; its last token is read alone."""
    return [min(SEGMENT, shape.config.mem_len - t) for t in range(0, shape.config.mem_len, SEGMENT)]


@torch.no_grad()
def _log_probs(model: TransformerXL, shape: DecodeShape, *, cached: bool) -> Tensor:
    """[B, V], after the last token of the prompts."""
    reader = Reader(model, shape.batch_size, cached=cached)
    hidden = None
    for segment in shape.prompts().split([*_segments(shape), 1], dim=1):
        hidden = reader.read(list(segment))
    assert hidden is not None
    return model.log_probs(hidden)


@functools.lru_cache(maxsize=1)
def _expected(shape: DecodeShape) -> Tensor:
    """Centred log-probabilities of the specification in float64, with hidden states as memory."""
    model = _float32_model(shape, "reference").double()
    return _centred(_log_probs(model, shape, cached=False))


def _centred(log_probs: Tensor) -> Tensor:
    """Without the part that all tokens share, which is the largest and depends little on them."""
    precise = log_probs.double()
    return precise - precise.mean(dim=1, keepdim=True)


@functools.lru_cache(maxsize=8)
def _n_weights(config: ModelConfig) -> tuple[int, int]:
    """Of the layers' products in a step (that of the positions is cached), and of the softmax."""
    with torch.device("meta"):
        model = TransformerXL(config)
    linear = [
        module.weight.numel()
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("r_net")
    ]
    return sum(linear), sum(parameter.numel() for parameter in model.crit.parameters())
