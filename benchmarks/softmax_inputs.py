"""The inputs of an adaptive softmax benchmark: a named vocabulary, weights, and targets as words
fall in text."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

# Zipf and Mandelbrot: p of the r-th word ∝ (r + OFFSET)^-EXPONENT. In WikiText-103's vocabulary
# the first word then has 6% of all tokens, the first ten 28%, the first 20,000 92%; counted in
# WikiText-2: 5.5, 29, and at least 93% of the larger corpus's held-out text.
OFFSET, EXPONENT = 2.7, 1.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxShape:
    """An adaptive softmax and the number of tokens N; cluster k is d // div_val**k wide.

    With div_val = 1 the clusters have no projections, as in the model.
    """

    name: str
    N: int
    d: int
    V: int
    cutoffs: tuple[int, ...]
    div_val: int

    @property
    def ends(self) -> tuple[int, ...]:
        return (0, *self.cutoffs, self.V)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each cluster."""
        return tuple(right - left for left, right in itertools.pairwise(self.ends))

    def targets(self) -> Tensor:
        """int64 [N], drawn by Zipf's and Mandelbrot's law."""
        probs = (torch.arange(1, self.V + 1, dtype=torch.float64) + OFFSET) ** -EXPONENT
        generator = torch.Generator().manual_seed(0)
        return torch.multinomial(probs, self.N, replacement=True, generator=generator)

    @property
    def flop(self) -> int:
        """Useful operations forward and backward: three products per weight that is needed.

        The head is needed by all tokens, a tail by those that fall in it.
        """
        target = self.targets()
        counts = [
            int(((target >= a) & (target < b)).sum()) for a, b in itertools.pairwise(self.ends)
        ]
        products = self.N * (self.sizes[0] + len(self.cutoffs)) * self.d
        for k, (n, size) in enumerate(zip(counts[1:], self.sizes[1:], strict=True), start=1):
            width = self.d // self.div_val**k
            products += n * size * width + (n * width * self.d if self.div_val > 1 else 0)
        return 3 * 2 * products

    def tiny(self) -> SoftmaxShape:
        """The same kind of softmax, small enough to load every library with."""
        return dataclasses.replace(self, N=16, d=64, V=400, cutoffs=(50, 100, 300))


class SoftmaxInputs(NamedTuple):
    """Tensors of one call; only the head has a bias, as in torch's module."""

    hidden: Tensor  # [N, d]
    target: Tensor  # [N]
    head_weight: Tensor  # [c0 + n_tails, d]
    head_bias: Tensor  # [c0 + n_tails]
    tail_weights: list[Tensor]  # [V_k, d_k]
    projections: list[Tensor]  # [d_k, d]; empty without projections

    def leaves(self) -> dict[str, Tensor]:
        """By name, what gets a gradient."""
        named = {name: getattr(self, name) for name in ("hidden", "head_weight", "head_bias")}
        for name in ("tail_weights", "projections"):
            named |= {f"{name}[{k}]": x for k, x in enumerate(getattr(self, name))}
        return named

    def convert(self, dtype: torch.dtype, device: str | None = None) -> SoftmaxInputs:
        """The same values, as leaves of their own in `dtype`; on `device` if it is given."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype).clone().requires_grad_()

        hidden, target, weight, bias, *lists = self
        lists = [[leaf(x) for x in part] for part in lists]
        return SoftmaxInputs(leaf(hidden), target.to(device), leaf(weight), leaf(bias), *lists)


def random_softmax(shape: SoftmaxShape, dtype: torch.dtype, seed: int = 1) -> SoftmaxInputs:
    """Normal values, such that logits have variance 1; contiguous leaves, the same for one seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(dtype).requires_grad_()

    d, n_tails = shape.d, len(shape.cutoffs)
    widths = [d // shape.div_val**k for k in range(1, n_tails + 1)]
    return SoftmaxInputs(
        hidden=normal(shape.N, d, std=1.0),
        target=shape.targets(),
        head_weight=normal(shape.sizes[0] + n_tails, d, std=d**-0.5),
        head_bias=normal(shape.sizes[0] + n_tails, std=0.1),
        tail_weights=[
            normal(size, width, std=width**-0.5)
            for size, width in zip(shape.sizes[1:], widths, strict=True)
        ],
        projections=[normal(w, d, std=d**-0.5) for w in widths] if shape.div_val > 1 else [],
    )
