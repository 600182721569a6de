"""Adaptive embedding in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding

from txl_kernels.backends.reference.precision import widened, work_dtype


def embed(
    tokens: Tensor,  # [...] int64
    tables: Sequence[Tensor],  # [V_k, d_k]
    projections: Sequence[Tensor | None],  # [d, d_k]
    scale: float,
    sparse: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Row of the token's table, projected, times scale: [..., d] in the tables' dtype.

    Every table is indexed with every token, with row 0 for tokens of other tables, and the rows
    read for those are masked: the host never reads a token. All sums, the gradients' too, are in
    `compute_dtype`, by default float32 (float64 for float64): tables are cast before they are
    indexed. With `sparse` only the distinct rows are cast, which the host must count, so that each
    row's sum is rounded once too; the gradient may hold zeros for row 0.
    """
    dtype = tables[0].dtype
    work = compute_dtype or work_dtype(dtype)
    tables = tables if sparse else widened(tables, work)
    parts = []
    first = 0
    for table, projection in zip(tables, widened(projections, work), strict=True):
        within = tokens - first
        inside = (within >= 0) & (within < table.shape[0])
        within = within.where(inside, 0)
        rows = table
        if sparse:
            distinct, within = within.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            rows = embedding(distinct, table, sparse=True).to(work)
        found = embedding(within, rows).masked_fill(~inside[..., None], 0.0)
        parts.append(found if projection is None else found @ projection.transpose(-1, -2))
        first = first + table.shape[0]  # not in place: torch.jit.trace counts sizes in tensors
    return (scale * sum(parts[1:], start=parts[0])).to(dtype)
