"""Scoring a model on tokens, with the protocol that gives the score its meaning."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer_xl.data import OrderedBatches, ShuffledSentenceBatches
from transformer_xl.data.token_file import TokenArray
from transformer_xl.key_value_window import KeyValueWindow, empty_memory, unsupported_reason
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL
from transformer_xl.nn.inference import inference
from transformer_xl.quantization import quantized_kind
from txl_kernels.ops.autocast import autocast_dtype

Batches = OrderedBatches | ShuffledSentenceBatches


class Lengths(NamedTuple):
    """How a model reads, in tokens, as in `ModelConfig`."""

    mem_len: int
    clamp_len: int = -1
    same_length: bool = False

    def described(self, tgt_len: int) -> list[str]:
        """Parts of a protocol, with the tokens that are read at a time."""
        return [
            f"tgt_len {tgt_len}",
            f"mem_len {self.mem_len}",
            f"clamp_len {self.clamp_len if self.clamp_len > 0 else 'none'}",
            f"same_length {'yes' if self.same_length else 'no'}",
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A model's mean loss over tokens.

    loss: nats per token. n_tokens: tokens scored. seconds: wall time.
    protocol: one sentence with everything that the score depends on beside the model.
    """

    loss: float
    n_tokens: int
    seconds: float
    protocol: str

    @property
    def bpc(self) -> float:
        """Bits per token: bits per character (or byte) where tokens are these."""
        return self.loss / math.log(2)

    @property
    def ppl(self) -> float:
        """Perplexity per token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def tokens_per_second(self) -> float:
        """Tokens scored in a second."""
        return self.n_tokens / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """The score for JSON."""
        derived = {name: getattr(self, name) for name in ("bpc", "ppl", "tokens_per_second")}
        return dataclasses.asdict(self) | derived


def evaluate(
    model: TransformerXL,
    tokens: TokenArray,
    *,
    batch_size: int,
    tgt_len: int,
    mem_len: int,
    clamp_len: int = -1,
    same_length: bool = False,
    cached: bool = True,
    cache_dtype: torch.dtype | None = None,
) -> Score:
    """Score one-dimensional `tokens` in `batch_size` contiguous streams, `tgt_len` at a time.

    Lengths are in tokens, as in `ModelConfig`. See `score` for what else holds.

    Raises:
        ValueError: lengths or sizes that do not fit the tokens or each other.
    """
    lengths = Lengths(mem_len=mem_len, clamp_len=clamp_len, same_length=same_length)
    batches = OrderedBatches(tokens, batch_size, tgt_len)
    return score(model, batches, lengths, len(tokens), cached=cached, cache_dtype=cache_dtype)


def score(
    model: TransformerXL,
    batches: Batches,
    lengths: Lengths,
    n_tokens: int,
    *,
    max_steps: int = -1,
    source: str = "",
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    before_batch: Callable[[], None] = lambda: None,
    cached: bool = True,
    cache_dtype: torch.dtype | None = None,
) -> Score:
    """Score one pass of `batches`, every row beginning without memory.

    During each forward pass the model has the given lengths, whatever it was trained with, and
    every module is in evaluation mode; otherwise the model's lengths and the modules' modes are
    their own. Runs under the caller's autocast.

    Args:
        n_tokens: tokens that the batches were cut from, for the protocol.
        max_steps: segments of each stream to score; 0 or less: all.
        source: split, corpus and its own protocol, for the same.
        total: where several processes share the rows, the sum of a tensor over all.
        before_batch: called before each batch; an exception that it raises ends the scoring.
        cached: keep keys and values in a `KeyValueWindow`; False: keep hidden states and project
            them again for each segment, which is slower and gives the same score up to rounding.
            It is done in any case where no window serves the model. The protocol mentions it.
        cache_dtype: of these keys and values, and so of the attention; None: as
            `KeyValueWindow.empty` chooses it. The protocol mentions another one.
    """
    started = time.perf_counter()
    empty = functools.partial(empty_memory, model, cached=cached, cache_dtype=cache_dtype)
    sums = _sum_of_losses(model, batches, lengths, max_steps, before_batch, empty)
    loss, scored = total(sums).tolist()
    protocol = [
        f"batch {batches.batch_size}",
        *lengths.described(batches.tgt_len),
        "every stream starts without memory",
        *([f"the first {max_steps} segments of each stream"] if max_steps > 0 else []),
        f"{n_tokens - int(scored):,} of {n_tokens:,} tokens not scored",
        *numerics(model, cached=cached, cache_dtype=cache_dtype),
    ]
    return Score(
        loss=loss / scored,
        n_tokens=int(scored),
        seconds=time.perf_counter() - started,
        protocol=", ".join([source, *protocol] if source else protocol),
    )


@contextlib.contextmanager
def reading(model: TransformerXL, lengths: Lengths) -> Iterator[None]:
    """Set `model` to these lengths and to inference, for one forward pass."""
    own = Lengths(model.mem_len, model.clamp_len, model.same_length)
    model.set_lengths(**lengths._asdict())
    try:
        with inference(model):
            yield
    finally:
        model.set_lengths(**own._asdict())


def _sum_of_losses(
    model: TransformerXL,
    batches: Batches,
    lengths: Lengths,
    max_steps: int,
    before_batch: Callable[[], None],
    empty: Callable[[int], Memory | KeyValueWindow],
) -> Tensor:
    """Return the loss in nats summed over the scored tokens, and their number: float64 [2].

    `empty` returns the memory before the first segment of a number of rows.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    memory: Memory | KeyValueWindow | None = None
    for batch in itertools.islice(batches, max_steps if max_steps > 0 else None):
        before_batch()
        if memory is not None and batch.reset is not None:
            memory = memory.reset(batch.reset.to(device))
        tokens, targets = batch.tokens.to(device), batch.targets.to(device)
        with reading(model, lengths):
            if memory is None:
                memory = empty(len(tokens))
            output = model(tokens, memory, targets, reduction="sum")
        memory = output.memory
        sums += torch.stack([output.loss.double(), (targets >= 0).sum().double()])
    return sums


def numerics(
    model: TransformerXL, *, cached: bool = True, cache_dtype: torch.dtype | None = None
) -> list[str]:
    """Parts of a protocol: the dtypes in which a model computes now, and the form of its memory."""
    weights = model.table()
    lower = autocast_dtype(weights.device)
    parts = [_name(weights.dtype) if lower is None else f"autocast to {_name(lower)}"]
    if (kind := quantized_kind(model)) is not None:
        parts.append(f"quantised linear layers ({kind})")
    reason = unsupported_reason(model)
    if not cached or reason is not None:
        because = f" ({reason})" if reason else ""
        parts.append(f"hidden states projected again for each segment{because}")
    elif cache_dtype not in (None, lower or weights.dtype):
        parts.append(f"keys and values in {_name(cache_dtype)}")
    return parts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
