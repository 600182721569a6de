"""The adaptive embedding of a published model: rows and their gradients, beside the original's way
and one plain table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.cases import OURS, WrongResultError
from benchmarks.measure import Timed, stopwatch
from benchmarks.peers import adaptive_embedding as peers
from benchmarks.softmax_inputs import SoftmaxShape
from txl_kernels import adaptive_embedding

Gradients = Literal["dense", "sparse"]
Weights = tuple[list[Tensor], list[Tensor | None]]  # tables [V_k, d_k], projections [d, d_k]

TABLES, ONE_TABLE = "tables", "one-table"

# Relative error against float64, by Frobenius norm, above which a result is another one.
GATE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class EmbeddingCase:
    """Forward and backward of the embedding tied to a softmax of this shape, the tables' gradients
    dense or sparse. With div_val = 1 it is one table without projection."""

    shape: SoftmaxShape
    dtype: torch.dtype
    gradients: Gradients
    device: ClassVar[str] = "cpu"
    bytes_read: ClassVar[None] = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"adaptive_embedding/{self.shape.name}/{dtype}/{self.gradients}"

    @property
    def peers(self) -> tuple[str, ...]:
        return (TABLES,)

    @property
    def yardsticks(self) -> tuple[str, ...]:
        """One table of all V at full width, where the model has several."""
        return (ONE_TABLE,) if self.shape.div_val > 1 else ()

    @property
    def in_process(self) -> tuple[str, ...]:
        return (OURS, *self.peers, *self.yardsticks)

    @property
    def flop(self) -> None:
        return None

    @property
    def tokens(self) -> int:
        return self.shape.N

    def tiny(self) -> EmbeddingCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        embed, leaves = self._bind(name)
        dout = self._dout()
        yield stopwatch(lambda: torch.autograd.grad(embed(), leaves, dout))

    def check(self, name: str) -> None:
        if name == ONE_TABLE:
            return
        embed, leaves = self._bind(name)
        out = embed()
        got = out.detach(), *torch.autograd.grad(out, leaves, self._dout())
        labels = ("out", *(f"gradient {k}" for k in range(len(leaves))))
        for label, result, right in zip(labels, got, self._expected(), strict=True):
            error = float((result.to_dense().double() - right).norm() / right.norm())
            if not error <= GATE[self.dtype]:  # NaN is an error too
                raise WrongResultError(
                    f"{self.name}: {label} of {name} is off by {error:.1e} of its norm; "
                    f"{GATE[self.dtype]:.0e} is allowed"
                )

    def _bind(self, name: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """The forward pass, and what gets a gradient."""
        shape, tokens = self.shape, self.shape.targets()
        options = {"scale": shape.d**0.5, "sparse": self.gradients == "sparse"}
        if name == ONE_TABLE:
            table = _normal(shape.V, shape.d).to(self.dtype).requires_grad_()
            return functools.partial(peers.one_table, tokens, table, **options), [table]
        tables, projections = weights = random_embedding(shape, self.dtype)
        if name == OURS:
            cutoffs = shape.cutoffs if len(tables) > 1 else ()
            call = functools.partial(adaptive_embedding, tokens, *weights, cutoffs, **options)
        else:
            call = functools.partial(peers.table_by_table, tokens, *weights, **options)
        return call, [x for x in (*tables, *projections) if x is not None]

    def _dout(self) -> Tensor:
        return _normal(self.shape.N, self.shape.d, seed=2).to(self.dtype)

    def _expected(self) -> list[Tensor]:
        """Rows and gradients in float64 from the weights as `dtype` rounds them, each table's
        rows in turn."""
        tables, projections = random_embedding(self.shape, self.dtype)
        tokens, scale = self.shape.targets(), self.shape.d**0.5
        dout = scale * self._dout().double()
        out = torch.zeros_like(dout)
        dtables, dprojections, first = [], [], 0
        for table, projection in zip(tables, projections, strict=True):
            places = ((tokens >= first) & (tokens < first + len(table))).nonzero()[:, 0]
            named, own = tokens[places] - first, dout[places]
            rows, back = table.detach()[named].double(), own
            if projection is not None:
                wide = projection.detach().double()
                dprojections.append(own.T @ rows)
                rows, back = rows @ wide.T, own @ wide
            out[places] = scale * rows
            dtable = torch.zeros(table.shape, dtype=torch.float64)
            dtables.append(dtable.index_add_(0, named, back))
            first += len(table)
        return [out, *dtables, *dprojections]


def random_embedding(shape: SoftmaxShape, dtype: torch.dtype) -> Weights:
    """Tables and projections as leaves, such that rows have variance 1; always the same."""
    if shape.div_val == 1:
        return [_normal(shape.V, shape.d).to(dtype).requires_grad_()], [None]
    ends = itertools.pairwise(shape.ends)
    widths = [shape.d // shape.div_val**k for k in range(len(shape.sizes))]
    tables = [
        _normal(end - first, width, seed=k).to(dtype).requires_grad_()
        for k, ((first, end), width) in enumerate(zip(ends, widths, strict=True))
    ]
    projections: list[Tensor | None] = [
        (_normal(shape.d, width, seed=k) * width**-0.5).to(dtype).requires_grad_()
        for k, width in enumerate(widths, start=len(widths))
    ]
    return tables, projections


def _normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))
