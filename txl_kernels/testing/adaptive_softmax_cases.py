"""Named cases of the adaptive softmax: shapes that every backend is tested with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Cluster = tuple[Tensor | None, Tensor, Tensor | None]
Inputs = tuple[Tensor, Tensor, Cluster, list[Cluster]]


@dataclass(frozen=True)
class AdaptiveSoftmaxCase:
    """Shapes of one call; the tensors follow from them and a fixed seed."""

    name: str
    V: int
    cutoffs: tuple[int, ...] = ()
    N: int = 37
    d: int = 12
    div: int = 2
    project: bool = True
    bias: bool = True

    def __str__(self) -> str:
        return f"{self.name}-V{self.V}N{self.N}d{self.d}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """hidden, target, head and tails, the floating ones leaves; the last target is ignored."""
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            x: Tensor = drawn / shape[-1] ** 0.5
            return x.to(device, dtype).requires_grad_()

        edges = (*self.cutoffs, self.V)
        n_tails = len(self.cutoffs)

        def cluster(k: int, n_columns: int) -> Cluster:
            width = max(1, self.d // self.div**k) if self.project else self.d
            projection = normal(width, self.d) if self.project else None
            return projection, normal(n_columns, width), normal(n_columns) if self.bias else None

        head = cluster(0, edges[0] + n_tails)
        tails = [cluster(k + 1, edges[k + 1] - edges[k]) for k in range(n_tails)]
        hidden = normal(self.N, self.d)
        target = torch.randint(0, self.V, (self.N,), generator=generator, device="cpu")
        if self.N:
            target[-1] = -100
        return hidden, target.to(device), head, tails

    def call(self, op: Callable[..., Any], inputs: Inputs, **options: Any) -> Any:
        """One public op on these inputs; with the target if it has one."""
        hidden, target, (head_proj, head_weight, head_bias), tails = inputs
        given = (hidden, target) if op.__name__ in ("adaptive_nll", "adaptive_loss") else (hidden,)
        weights: dict[str, Any] = {
            "cutoffs": self.cutoffs,
            "head_bias": head_bias,
            "head_proj": head_proj,
        }
        return op(*given, head_weight, tails, **weights, **options)


ADAPTIVE_SOFTMAX_CASES = (
    AdaptiveSoftmaxCase("two_tails", V=50, cutoffs=(10, 25)),
    AdaptiveSoftmaxCase("no_tails", V=50),
    AdaptiveSoftmaxCase("no_tails_no_projection", V=10, project=False, bias=False),
    AdaptiveSoftmaxCase("no_biases", V=50, cutoffs=(10, 25), bias=False),
    AdaptiveSoftmaxCase("no_projections", V=50, cutoffs=(10, 25), project=False),
    AdaptiveSoftmaxCase("ten_tokens", V=10, cutoffs=(1, 2, 9), N=7),
    AdaptiveSoftmaxCase("one_token", V=50, cutoffs=(10,), N=1),
    AdaptiveSoftmaxCase("two_pieces", V=9100, cutoffs=(4300,), N=5, d=4),
    AdaptiveSoftmaxCase("wide_ratio", V=700, cutoffs=(20, 60, 300), N=129, d=64, div=4),
)
