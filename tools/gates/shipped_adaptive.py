"""Shipped calls of the adaptive softmax and embedding."""

from __future__ import annotations

import dataclasses
import functools
from itertools import pairwise

import torch
from torch import Tensor

from tools.gates.shipped import Call
from txl_kernels.backends.triton import adaptive_embedding, adaptive_softmax


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Sizes of a call: N tokens of width d; each tail is a `div_val`-th as wide as the one before.

    WikiText-103's clusters, the head without a projection, as if d_embed is d_model.
    """

    N: int = 8192
    d: int = 1024
    div_val: int = 4
    borders: tuple[int, ...] = (20_000, 40_000, 200_000, 267_735)
    dtype: torch.dtype = torch.bfloat16
    biases: bool = True

    @property
    def sizes(self) -> list[int]:
        """Tokens of the tails."""
        return [end - begin for begin, end in pairwise(self.borders)]

    @property
    def widths(self) -> list[int]:
        """Widths of the tails."""
        return [self.d // self.div_val ** (k + 1) for k in range(len(self.sizes))]

    def loss(self) -> None:
        """`adaptive_loss`, whose forward pass computes the gradients."""
        hidden, target, clusters = self._inputs()
        needs_grad = [True] * (1 + len(clusters))
        loss, grads = adaptive_softmax.adaptive_loss_fwd(
            hidden, target, clusters, -100, True, needs_grad
        )
        adaptive_softmax.adaptive_loss_bwd(loss, grads)

    def nll(self) -> None:
        """`adaptive_nll`, forward and backward."""
        hidden, target, clusters = self._inputs()
        nll, lse = adaptive_softmax.adaptive_nll_fwd(hidden, target, clusters, -100)
        needs_grad = [True] * (1 + len(clusters))
        adaptive_softmax.adaptive_nll_bwd(nll, hidden, target, clusters, -100, lse, needs_grad)

    def embedding(self) -> None:
        """`adaptive_embedding`, forward and backward with dense gradients."""
        made = functools.partial(torch.empty, dtype=self.dtype, device="meta")
        tokens = torch.empty(self.N, dtype=torch.int64, device="meta")
        widths = [self.d, *self.widths]
        sizes = [self.borders[0], *self.sizes]
        tables = [made(size, width) for size, width in zip(sizes, widths, strict=True)]
        projections = [made(self.d, width) for width in widths]
        arguments = (tokens, tables, projections, 32.0, False)
        dout = adaptive_embedding.adaptive_embedding_fwd(*arguments)
        needs_grad = [True] * (len(tables) + len(projections))
        adaptive_embedding.adaptive_embedding_bwd(dout, *arguments, needs_grad)

    def _inputs(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        made = functools.partial(torch.empty, dtype=self.dtype, device="meta")
        n_head = self.borders[0] + len(self.sizes)
        clusters = [made(0), made(n_head, self.d), made(n_head if self.biases else 0)]
        for size, width in zip(self.sizes, self.widths, strict=True):
            clusters += [made(width, self.d), made(size, width), made(size if self.biases else 0)]
        target = torch.empty(self.N, dtype=torch.int64, device="meta")
        return made(self.N, self.d), target, clusters


def calls() -> list[Call]:
    """WikiText-103's large model in each dtype; its base model, whose tails are as wide as d."""
    found = []

    def ship(op: str, configuration: str, headline: bool = False, **sizes: object) -> None:
        adaptive = dataclasses.replace(Adaptive(), **sizes)  # type: ignore[arg-type]
        dtype = str(adaptive.dtype).removeprefix("torch.")
        run = getattr(adaptive, op.removeprefix("adaptive_"))
        found.append(Call(f"{op}/{dtype}/{configuration}", run, headline))

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ship("adaptive_loss", "wt103_large", dtype == torch.bfloat16, dtype=dtype)
        ship("adaptive_nll", "wt103_large", dtype=dtype)
        ship("adaptive_embedding", "wt103_large", dtype == torch.bfloat16, dtype=dtype)
    ship("adaptive_loss", "no_biases", biases=False)
    for dtype in (torch.bfloat16, torch.float32):
        ship("adaptive_nll", "wt103_base", d=410, div_val=1, dtype=dtype)
    return found
