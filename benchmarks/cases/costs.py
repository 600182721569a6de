"""Times of calls of `rel_attention` relative to calls that they replace, and of a small call.

One packed row is compared with a call for each document, a long cache with a short one that has as
many valid keys, a small call with causal SDPA; each time both contenders run in the same rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import OURS, WrongResultError
from benchmarks.measure import Timed, stopwatch
from txl_kernels import packed_ranges, rel_attention

TOLERANCE = 1e-5  # relative error by Frobenius norm, as for the other cases in float32
Call = Callable[..., Tensor]  # of q, k, v and r


@dataclasses.dataclass(frozen=True)
class CostCase:
    """A float32 call on the CPU, compared with another one.

    Attributes:
        shape: name of the shape.
        direction: "forward" or "forward+backward".
        yardstick: name of the other contender.
        threads: number of threads of both; None: as many as the process has.
    """

    shape: str
    direction: str
    yardstick: str
    threads: int | None = None

    dtype = torch.float32
    device = "cpu"
    peers: tuple[str, ...] = ()
    in_process: tuple[str, ...] = ()
    flop: int | None = None
    bytes_read: int | None = None
    tokens: int | None = None

    @property
    def name(self) -> str:
        return f"rel_attention/{self.shape}/float32/{self.direction}"

    @property
    def yardsticks(self) -> tuple[str, ...]:
        return (self.yardstick,)

    def inputs(self) -> list[Tensor]:
        """q, k, v and r of ours."""
        raise NotImplementedError

    def ours(self) -> Call:
        """The measured call."""
        raise NotImplementedError

    def others(self, inputs: Sequence[Tensor]) -> tuple[Call, list[Sequence[Tensor]]]:
        """The yardstick's call, and the arguments of each time that it is called."""
        raise NotImplementedError

    def expected(self, inputs: Sequence[Tensor]) -> Tensor:
        """What ours must return: the results of the yardstick, joined."""
        call, arguments = self.others(inputs)
        return torch.cat([call(*each) for each in arguments], dim=2)

    def check(self, name: str) -> None:
        if name != OURS:
            return
        inputs = self.inputs()
        right = self.expected([x.double() for x in inputs])
        error = float((self.ours()(*inputs).double() - right).norm() / right.norm())
        if not error <= TOLERANCE:  # NaN is an error too
            raise WrongResultError(f"{self.name}: out is off by {error:.1e} of its norm")

    def tiny(self) -> CostCase:
        return self

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        call, arguments = self.ours(), [self.inputs()]
        if name != OURS:
            call, arguments = self.others(arguments[0])
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield stopwatch(self._run(call, arguments))
        finally:
            torch.set_num_threads(before)

    def _run(self, call: Call, arguments: Sequence[Sequence[Tensor]]) -> Callable[[], object]:
        """One run of all calls; each time the backward pass follows."""
        if self.direction == "forward":
            return torch.no_grad()(lambda: [call(*each) for each in arguments])
        leaves = [[x.clone().requires_grad_() for x in each] for each in arguments]
        douts = [normal(1, call(*each).shape)[0] for each in leaves]

        def run() -> None:
            for each, dout in zip(leaves, douts, strict=True):
                torch.autograd.grad(call(*each), each, dout)

        return run


@dataclasses.dataclass(frozen=True)
class Packing(CostCase):
    """Documents of equal length in one row, compared with one call for each of them."""

    n_documents: int = 16
    length: int = 512
    H: int = 8
    D: int = 64

    def inputs(self) -> list[Tensor]:
        T = self.n_documents * self.length
        return normal(0, *[(1, self.H, T, self.D)] * 3, (1, self.H, self.length, self.D))

    def ours(self) -> Call:
        T = self.n_documents * self.length
        key_start, key_lens = packed_ranges(torch.arange(0, T + 1, self.length), T)
        ranges = {"key_start": key_start, "key_lens": key_lens}
        # Rows of r are the distances length - 1 … 0.
        return functools.partial(rel_attention, causal=True, offset=self.length - 1, **ranges)

    def others(self, inputs: Sequence[Tensor]) -> tuple[Call, list[Sequence[Tensor]]]:
        *sequences, r = inputs
        documents = zip(*(x.split(self.length, dim=2) for x in sequences), strict=True)
        arguments = [[*(x.contiguous() for x in each), r] for each in documents]
        return functools.partial(rel_attention, causal=True), list(arguments)


@dataclasses.dataclass(frozen=True)
class Cache(CostCase):
    """One query in a cache with few valid keys, compared with a cache of these keys only.

    Row m of r is the distance Tk - 1 - m, in both.
    """

    capacity: int = 4096
    n_valid: int = 500
    H: int = 8
    D: int = 64

    def inputs(self) -> list[Tensor]:
        cache = (1, self.H, self.capacity, self.D)
        return normal(0, (1, self.H, 1, self.D), cache, cache, cache)

    def ours(self) -> Call:
        ends: dict[str, Any] = {"key_lens": torch.tensor([self.n_valid])}
        ends["q_start"] = torch.tensor([self.n_valid - 1])
        return functools.partial(rel_attention, causal=True, **ends)

    def others(self, inputs: Sequence[Tensor]) -> tuple[Call, list[Sequence[Tensor]]]:
        q, k, v, r = inputs
        keys = [x[:, :, : self.n_valid].contiguous() for x in (k, v)]
        rows = r[:, :, -self.n_valid :].contiguous()
        return functools.partial(rel_attention, causal=True), [[q, *keys, rows]]


@dataclasses.dataclass(frozen=True)
class SmallCall(CostCase):
    """A call with little arithmetic, compared with causal SDPA."""

    H: int = 2
    T: int = 16
    D: int = 32

    def inputs(self) -> list[Tensor]:
        return normal(0, *[(1, self.H, self.T, self.D)] * 4)

    def ours(self) -> Call:
        return functools.partial(rel_attention, causal=True)

    def others(self, inputs: Sequence[Tensor]) -> tuple[Call, list[Sequence[Tensor]]]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True)

        return attend, [inputs[:3]]

    def expected(self, inputs: Sequence[Tensor]) -> Tensor:
        out: Tensor = rel_attention(*inputs, causal=True, backend="reference")
        return out


def cost_cases() -> list[CostCase]:
    """All of them."""
    return [
        Packing("packing_16x512", "forward", "alone"),
        Packing("packing_16x512", "forward+backward", "alone"),
        Cache("cache_4096", "forward", "cache-500"),
        SmallCall("small_call", "forward", "sdpa-causal", threads=1),
    ]


def normal(seed: int, *shapes: Sequence[int]) -> list[Tensor]:
    """Tensors of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]
