"""Calls of the adaptive softmax and embedding that stand for all that is shipped."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from txl_kernels.testing.aot.gates import Gate
from txl_kernels.testing.aot.record import Launch
from txl_kernels.testing.aot.shipped import Call, Kernel
from txl_kernels.testing.asked import ASKED

_BACKEND = "txl_kernels.backends.triton"


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Sizes of a call: N tokens of width d; each tail is a `div_val`-th as wide as the one before.

    WikiText-103's clusters, the head without a projection, as where d_embed is d_model.
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
        """Of the tails."""
        return [self.d // self.div_val ** (k + 1) for k in range(len(self.sizes))]

    @property
    def shares(self) -> list[float]:
        """Of the tokens that fall into each tail, as words fall in text: Zipf's and Mandelbrot's
        law, token n with (n + 3.7)^-1.2, summed as an integral. The head has 92%."""
        beyond = [(border + 3.2) ** -0.2 for border in (0, *self.borders)]
        whole = beyond[0] - beyond[-1]
        return [(begin - end) / whole for begin, end in pairwise(beyond[1:])]

    def tail_flop(self) -> float:
        """Of the product of the tails' logits."""
        parts = zip(self.shares, self.sizes, self.widths, strict=True)
        return 2 * self.N * sum(share * size * width for share, size, width in parts)

    def projection_flop(self) -> float:
        """Of the product of the tails' rows and their projections."""
        parts = zip(self.shares, self.widths, strict=True)
        return 2 * self.N * self.d * sum(share * width for share, width in parts)

    def useful_flop(self) -> float:
        """Three products for each weight: what forward and backward need."""
        head = 2 * self.N * self.d * (self.borders[0] + len(self.sizes))
        return 3 * (head + self.tail_flop() + self.projection_flop())

    def loss(self) -> None:
        """`adaptive_loss`, whose forward pass forms the gradients."""
        op = importlib.import_module(f"{_BACKEND}.adaptive_softmax")
        hidden, target, clusters = self._inputs()
        needs_grad = [True] * (1 + len(clusters))
        loss, grads = op.adaptive_loss_fwd(hidden, target, clusters, -100, True, needs_grad)
        op.adaptive_loss_bwd(loss, grads)

    def nll(self) -> None:
        """`adaptive_nll`, forward and backward."""
        op = importlib.import_module(f"{_BACKEND}.adaptive_softmax")
        hidden, target, clusters = self._inputs()
        nll, lse = op.adaptive_nll_fwd(hidden, target, clusters, -100)
        needs_grad = [True] * (1 + len(clusters))
        op.adaptive_nll_bwd(nll, hidden, target, clusters, -100, lse, needs_grad)

    def embedding(self) -> None:
        """`adaptive_embedding`, forward and backward with dense gradients."""
        op = importlib.import_module(f"{_BACKEND}.adaptive_embedding")
        made = functools.partial(torch.empty, dtype=self.dtype, device="meta")
        tokens = torch.empty(self.N, dtype=torch.int64, device="meta")
        widths = [self.d, *self.widths]
        sizes = [self.borders[0], *self.sizes]
        tables = [made(size, width) for size, width in zip(sizes, widths, strict=True)]
        projections = [made(self.d, width) for width in widths]
        dout = op.adaptive_embedding_fwd(tokens, tables, projections, 32.0, False)
        needs_grad = [True] * (len(tables) + len(projections))
        op.adaptive_embedding_bwd(dout, tokens, tables, projections, 32.0, False, needs_grad)

    def _inputs(self) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        made = functools.partial(torch.empty, dtype=self.dtype, device="meta")
        biased = self.biases
        n_head = self.borders[0] + len(self.sizes)
        clusters = [made(0), made(n_head, self.d), made(n_head if biased else 0)]
        for size, width in zip(self.sizes, self.widths, strict=True):
            clusters += [made(width, self.d), made(size, width), made(size if biased else 0)]
        target = torch.empty(self.N, dtype=torch.int64, device="meta")
        return made(self.N, self.d), target, clusters

    def kernels(self) -> dict[str, Kernel]:
        """What the calls may launch, and the FLOP of one launch at Zipf's shares."""
        product = Kernel(_product_gate)
        rows = dataclasses.replace(product, flop=self.projection_flop())
        logits = self.tail_flop()
        moves = Kernel(_no_products)
        return {
            "_adaptive_rows_kernel": rows,
            "_adaptive_outer_kernel": rows,
            "_adaptive_tails_fwd_kernel": dataclasses.replace(product, flop=logits),
            "_adaptive_tails_dx_kernel": dataclasses.replace(product, flop=2 * logits),
            "_adaptive_tails_dweight_kernel": dataclasses.replace(product, flop=2 * logits),
            "_adaptive_head_lse_kernel": moves,
            "_adaptive_head_grad_kernel": moves,
            "_adaptive_buckets_kernel": moves,
            "_adaptive_scale_kernel": moves,
            "_adaptive_tails_join_kernel": moves,
            "_adaptive_tails_dx_join_kernel": moves,
            "_adaptive_embedding_dtables_kernel": moves,
        }


def calls() -> list[Call]:
    """WikiText-103's large model in each dtype; its base one, whose tails are as wide as d."""
    bf16, large = torch.bfloat16, Adaptive()
    found = [
        _call("adaptive_loss", "wt103_large", large, in_ci=True, modelled=True),
        _call("adaptive_nll", "wt103_large", large, modelled=True),
        _call("adaptive_embedding", "wt103_large", large, in_ci=True, modelled=True),
        _call("adaptive_loss", "no_biases", dataclasses.replace(large, biases=False)),
        _call("adaptive_loss", "wt103_large", dataclasses.replace(large, dtype=torch.float16)),
    ]
    for dtype in (bf16, torch.float32):
        equal = Adaptive(d=410, div_val=1, dtype=dtype)
        found.append(_call("adaptive_nll", "equal_widths", equal))
    single = dataclasses.replace(large, dtype=torch.float32)
    found.append(_call("adaptive_loss", "wt103_large", single))
    return [*found, _call("adaptive_embedding", "wt103_large", single)]


def _call(
    op: str, what: str, sizes: Adaptive, *, in_ci: bool = False, modelled: bool = False
) -> Call:
    dtype = str(sizes.dtype).removeprefix("torch.")
    run = {
        "adaptive_loss": sizes.loss,
        "adaptive_nll": sizes.nll,
        "adaptive_embedding": sizes.embedding,
    }[op]
    part = "forward+backward"
    asked = ASKED.get(f"{op}/{part}") if modelled else None
    return Call(
        f"{op}/{dtype}/{what}",
        run,
        sizes.kernels(),
        in_ci,
        modelled,
        flop={} if op == "adaptive_embedding" else {part: sizes.useful_flop()},
        asked={} if asked is None else {part: asked},
    )


def _product_gate(launch: Launch, _arch: int) -> Gate:
    types = str(launch.signature.values())
    return Gate("tensor" if "*bf16" in types or "*fp16" in types else "none", shuffles=None)


def _no_products(_launch: Launch, _arch: int) -> Gate:
    return Gate("no products", shuffles=None)
