"""A whole Transformer-XL: its training step and its evaluation of a segment, on a full memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.cases import OURS, WrongResultError
from benchmarks.measure import Timed, stopwatch
from benchmarks.peers.hf import HuggingFaceWorker
from transformer_xl.config import ModelConfig
from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL

Work = Literal["train_step", "evaluate"]

REFERENCE, HF, HF_BF16 = "reference", "hf", "hf-bf16"
HIDDEN_STATES = "hidden-states"

# Relative error of losses and of the gradient's norm above which a model is another one.
GATE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model and its batch; `config.mem_len` and `tgt_len` in tokens."""

    name: str
    config: ModelConfig
    batch_size: int
    tgt_len: int
    lr: float
    clip: float

    def tokens(self) -> Tensor:
        """int64 [batch_size, 2·tgt_len]: a segment that fills the memory, and the one timed."""
        generator = torch.Generator().manual_seed(0)
        size = (self.batch_size, 2 * self.tgt_len)
        return torch.randint(self.config.vocab_size, size, generator=generator)

    def tiny(self) -> ModelShape:
        config = dataclasses.replace(self.config, d_inner=64, mem_len=16)
        return dataclasses.replace(self, config=config, tgt_len=16)


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """Training ("train_step": forward, backward, clipping, Adam) or scoring of a segment.

    bfloat16 means autocast. Peer `hf` always computes in float32, as it is run; `hf-bf16` under
    autocast too. The yardstick `reference` is our own model without the kernel; `hidden-states`
    evaluates with a memory of hidden states, ours with a `KeyValueWindow`.
    """

    shape: ModelShape
    dtype: torch.dtype
    work: Work
    device: ClassVar[str] = "cpu"
    bytes_read: ClassVar[None] = None

    @property
    def name(self) -> str:
        return f"model/{self.shape.name}/{str(self.dtype).removeprefix('torch.')}/{self.work}"

    @property
    def peers(self) -> tuple[str, ...]:
        return (HF,) if self.dtype == torch.float32 else (HF, HF_BF16)

    @property
    def yardsticks(self) -> tuple[str, ...]:
        return (HIDDEN_STATES, REFERENCE) if self.work == "evaluate" else (REFERENCE,)

    @property
    def in_process(self) -> tuple[str, ...]:
        return (OURS, *self.yardsticks)

    @property
    def flop(self) -> None:
        return None

    @property
    def tokens(self) -> int:
        return self.shape.batch_size * self.shape.tgt_len

    def tiny(self) -> ModelCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        if name in (HF, HF_BF16):
            with self._worker() as worker:
                yield lambda: worker.ask(self.work, bf16=name == HF_BF16)["seconds"]
        else:
            yield stopwatch(getattr(self._run(name), self.work))

    def check(self, name: str) -> None:
        if name in (HF, HF_BF16):
            with self._worker() as worker:
                answer = worker.ask("check", bf16=name == HF_BF16)
            got = (*answer["losses"], answer["grad_norm"])
        else:
            got = self._run(name).check()
        tolerance = GATE[torch.float32 if name == HF else self.dtype]
        labels = ("first loss", "second loss", "gradient norm")
        for label, value, right in zip(labels, got, _reference_figures(self.shape), strict=True):
            if not abs(value - right) <= tolerance * abs(right):  # NaN is an error too
                raise WrongResultError(
                    f"{self.name}: {label} of {name} is {value:.6g}, float64 says {right:.6g}"
                )

    def _run(self, name: str) -> Run:
        backend = REFERENCE if name == REFERENCE else "auto"
        return Run(self.shape, self.dtype, backend, cached=name != HIDDEN_STATES)

    def _worker(self) -> HuggingFaceWorker:
        shape = self.shape
        model = Run(shape, torch.float32, "auto").model
        return HuggingFaceWorker(model, shape.config, shape.tokens(), lr=shape.lr, clip=shape.clip)


class Run:
    """Our model in training and evaluation as `transformer_xl` does them, without data.

    `cached`: evaluate with a `KeyValueWindow`; False: with the memory of training.
    """

    def __init__(
        self, shape: ModelShape, dtype: torch.dtype, backend: str, *, cached: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.model = TransformerXL(shape.config, backend=backend)
        if dtype == torch.float64:
            self.model.double()
        self.autocast = dtype == torch.bfloat16
        self.clip = shape.clip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=shape.lr, fused=True)
        self.first, self.second = shape.tokens().chunk(2, dim=1)
        self.memory = self.model.eval()(self.first).memory
        self.cached = cached

    @functools.cached_property
    def window(self) -> KeyValueWindow:
        """The window after the first segment."""
        with self._autocast(), torch.no_grad():
            window = KeyValueWindow.empty(self.model.eval(), len(self.first))
            self.model(self.first, window)
        return window

    def train_step(self) -> None:
        """One step with dropout."""
        self.model.train()
        self._loss(self.second, self.memory).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self) -> None:
        """The loss of a segment, without dropout and gradients."""
        self.model.eval()
        with torch.no_grad():
            self._loss(self.second, self.window if self.cached else self.memory)

    def check(self) -> tuple[float, float, float]:
        """Without dropout: mean losses of both segments in nats, the second's gradient norm.

        With `cached` the second loss is that of evaluation.
        """
        self.model.eval()
        first = self._loss(self.first, None).item()
        second = self._loss(self.second, self.memory)
        second.backward()
        if self.cached:
            with torch.no_grad():
                second = self._loss(self.second, self.window)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        self.optimizer.zero_grad(set_to_none=True)
        return first, second.item(), norm

    def _loss(self, tokens: Tensor, memory: Memory | KeyValueWindow | None) -> Tensor:
        """Of each token but the first, given those before: the targets that `hf` makes itself."""
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        with self._autocast():
            loss = self.model(tokens, memory, targets).loss
        assert loss is not None
        return loss

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


@functools.lru_cache(maxsize=1)
def _reference_figures(shape: ModelShape) -> tuple[float, float, float]:
    """`Run.check` of the specification in float64, from the same float32 weights."""
    return Run(shape, torch.float64, "reference").check()
