"""The inputs of an attention benchmark: a named shape, random tensors, the number of operations."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of one call of `rel_attention`; lengths in tokens (frames).

    Attributes:
        key_lens: if given, the argument of that name, one length per row.
        rel_extent: rows of r, shared by all heads, for the distances rel_extent - 1 … 0; pairs
            further apart have no position term. None: each head has a row for each distance.
        window: keys more than this many tokens before the query are masked.
        Hk: key heads; None: as many as query heads.
        d_rel: width of a separate position query, whose product with r is not scaled; such calls
            have no head biases. None: the queries are multiplied with r, too.
    """

    name: str
    B: int
    H: int
    Tq: int
    Tm: int
    D: int
    causal: bool
    key_lens: tuple[int, ...] | None = None
    rel_extent: int | None = None
    window: int | None = None
    Hk: int | None = None
    d_rel: int | None = None

    @property
    def n_key_heads(self) -> int:
        """Heads of keys and values."""
        return self.Hk or self.H

    @property
    def n_keys(self) -> int:
        """Keys of memory and segment."""
        return self.Tm + self.Tq

    @property
    def n_rows(self) -> int:
        """Rows of r: distances Tk - 1 … 0, or down to -(Tq - 1) if not causal."""
        if self.rel_extent is not None:
            return self.rel_extent
        return self.n_keys if self.causal else self.n_keys + self.Tq - 1

    @property
    def offset(self) -> int:
        """The row of r for the distance 0."""
        return (self.rel_extent or self.n_keys) - 1 - self.Tm

    @property
    def attended_pairs(self) -> int:
        """(query, key) pairs that the mask allows, over all rows and heads."""
        return self._pairs(self.n_keys if self.window is None else self.window + 1)

    @property
    def position_pairs(self) -> int:
        """The attended pairs that have a position term."""
        return min(self.attended_pairs, self._pairs(self.rel_extent or self.n_keys))

    def _pairs(self, reach: int) -> int:
        """Pairs of a query and one of the last `reach` keys that it attends to."""
        seen = torch.full((self.Tq,), self.n_keys)
        if self.causal:
            seen = (torch.arange(self.Tq) + self.Tm + 1).clamp(max=reach)
        key_lens = torch.tensor(self.key_lens or (self.n_keys,) * self.B)
        return int(torch.minimum(seen, key_lens[:, None]).sum()) * self.H

    def tiny(self) -> AttentionShape:
        """The same kind of call, small enough to load every library with."""
        key_lens = None if self.key_lens is None else (16,) * min(self.B, 2)
        small = {"B": min(self.B, 2), "Tq": min(self.Tq, 16), "Tm": min(self.Tm, 16)}
        rel_extent = None if self.rel_extent is None else 8
        window = None if self.window is None else 7
        shape = self.with_key_heads(1) if self.Hk else self.with_key_heads(min(self.H, 2))
        return dataclasses.replace(
            shape, **small, key_lens=key_lens, rel_extent=rel_extent, window=window
        )

    def with_key_heads(self, n: int) -> AttentionShape:
        """The same call with n key heads and their query heads."""
        if self.Hk is None:
            return dataclasses.replace(self, H=n)
        return dataclasses.replace(self, H=n * (self.H // self.Hk), Hk=n)


class AttentionInputs(NamedTuple):
    """Tensors of one call, as arguments of `rel_attention`; a memory of length 0 is None."""

    q: Tensor  # [B, H, Tq, D]
    k: Tensor  # [B, Hk, Tq, D]
    v: Tensor  # [B, Hk, Tq, D]
    r: Tensor  # [1, 1 or H, R, D or d_rel]
    r_w_bias: Tensor | None  # [H, D]
    r_r_bias: Tensor | None  # [H, D]
    mem_k: Tensor | None  # [B, Hk, Tm, D]
    mem_v: Tensor | None  # [B, Hk, Tm, D]
    q_pos: Tensor | None  # [B, H, Tq, d_rel]

    def leaves(self) -> tuple[Tensor, ...]:
        """The present tensors: all of them get gradients in a backward pass."""
        return tuple(tensor for tensor in self if tensor is not None)

    def convert(self, dtype: torch.dtype) -> AttentionInputs:
        """The same values, as leaves of their own in `dtype`, with the same `requires_grad`."""
        copies = (
            None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)
            for x in self
        )
        return AttentionInputs(*copies)


def random_inputs(
    shape: AttentionShape,
    dtype: torch.dtype,
    *,
    requires_grad: bool,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AttentionInputs:
    """Normal values, the same for one seed and kind of device.

    The standard deviation is 1, for head biases 0.1, for a position query d_rel^-0.5, so that its
    products with r have 1.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device) * std
        return values.to(dtype).requires_grad_(requires_grad)

    B, H, Tq, Tm, D = shape.B, shape.H, shape.Tq, shape.Tm, shape.D
    segment = (B, shape.n_key_heads, Tq, D)
    memory = [normal(B, shape.n_key_heads, Tm, D) if Tm else None for _ in range(2)]
    d_rel = shape.d_rel
    return AttentionInputs(
        q=normal(B, H, Tq, D),
        k=normal(*segment),
        v=normal(*segment),
        r=normal(1, H if shape.rel_extent is None else 1, shape.n_rows, d_rel or D),
        r_w_bias=None if d_rel else normal(H, D, std=0.1),
        r_r_bias=None if d_rel else normal(H, D, std=0.1),
        mem_k=memory[0],
        mem_v=memory[1],
        q_pos=normal(B, H, Tq, d_rel, std=d_rel**-0.5) if d_rel else None,
    )
