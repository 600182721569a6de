"""Linear layers of a decoding step, compared with torch's and with the memory's bandwidth."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import OURS, WrongResultError
from benchmarks.measure import Timed, stopwatch
from txl_kernels import few_row_linear

TORCH = "torch"
# The largest allowed relative error against float64, by Frobenius norm.
GATE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """`rows` rows of x times the weights [N, K] of several layers, one layer after the other.

    Attributes:
        quantised: the weights are int8 with a scale per output; torch's contender converts them to
            `dtype` and multiplies.
        weight_bytes: of all layers: more than the caches hold, as in a model.
    """

    rows: int
    N: int
    K: int
    dtype: torch.dtype
    quantised: bool = False
    weight_bytes: int = 2**28

    device: ClassVar[str] = "cpu"
    peers: ClassVar[tuple[str, ...]] = (TORCH,)
    yardsticks: ClassVar[tuple[str, ...]] = ()
    in_process: ClassVar[tuple[str, ...]] = (OURS, TORCH)
    flop: ClassVar[None] = None
    tokens: ClassVar[None] = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        weight = "int8" if self.quantised else dtype
        return f"few_row_linear/{self.N}x{self.K}_{weight}/{dtype}/{self.rows}_rows"

    @property
    def layers(self) -> int:
        return max(1, self.weight_bytes // self._layer_bytes)

    @property
    def bytes_read(self) -> int:
        return self.layers * self._layer_bytes

    @property
    def _layer_bytes(self) -> int:
        return self.N * self.K * (1 if self.quantised else self.dtype.itemsize)

    def tiny(self) -> LinearCase:
        return dataclasses.replace(self, N=64, K=64, weight_bytes=2**16)

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        x, weights, scale = self._inputs(self.layers)
        multiply = self._multiply(name)

        def run() -> None:
            with torch.no_grad():
                for weight in weights:
                    multiply(x, weight, scale)

        yield stopwatch(run)

    def check(self, name: str) -> None:
        x, (weight,), scale = self._inputs(1)
        out = self._multiply(name)(x, weight, scale).double()
        expected = F.linear(x.double(), weight.double())
        if scale is not None:
            expected *= scale.double()
        error = float((out - expected).norm() / expected.norm())
        if not error <= GATE[self.dtype]:  # NaN is an error too
            raise WrongResultError(
                f"{self.name}: {name} is off by {error:.1e} of its norm; "
                f"{GATE[self.dtype]:.0e} is allowed"
            )

    def _multiply(self, name: str) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        if name == OURS:
            return lambda x, weight, scale: few_row_linear(x, weight, weight_scale=scale)

        def by_torch(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
            out = F.linear(x, weight.to(x.dtype))
            return out if scale is None else (out * scale).to(x.dtype)

        return by_torch

    def _inputs(self, layers: int) -> tuple[Tensor, list[Tensor], Tensor | None]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.K, generator=generator).to(self.dtype)
        if not self.quantised:
            weight = torch.randn(self.N, self.K, generator=generator).to(self.dtype)
            return x, [weight.clone() for _ in range(layers)], None
        values = torch.randint(-127, 128, (self.N, self.K), generator=generator).to(torch.int8)
        return x, [values.clone() for _ in range(layers)], torch.rand(self.N, generator=generator)
