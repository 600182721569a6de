"""Adaptive embedding in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def embed(
    tokens: Tensor,  # [...] int64
    tables: Sequence[Tensor],  # [V_k, d_k]
    projections: Sequence[Tensor | None],  # [d, d_k]
    scale: float,
    sparse: bool = False,
) -> Tensor:
    """Row of the token's table, projected, times scale: [..., d] in the tables' dtype.

    Every token looks into every table, at row 0 where it is not its own, and what it finds there
    is masked: the host never reads a token. Products are float32 (float64 for float64). A sparse
    gradient so names row 0 for each token of another table, with zeros.
    """
    dtype = tables[0].dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    parts = []
    first = 0
    for table, projection in zip(tables, projections, strict=True):
        within = tokens - first
        inside = (within >= 0) & (within < table.shape[0])
        rows = torch.nn.functional.embedding(within.where(inside, 0), table, sparse=sparse).to(work)
        rows = rows.masked_fill(~inside[..., None], 0.0)
        parts.append(rows if projection is None else rows @ projection.to(work).transpose(-1, -2))
        first = first + table.shape[0]
    return (scale * sum(parts[1:], start=parts[0])).to(dtype)
