"""How people embed adaptively today: the original's way, table by table, and one plain table."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def table_by_table(
    tokens: Tensor,  # [N]
    tables: Sequence[Tensor],  # [V_k, d_k]
    projections: Sequence[Tensor | None],  # [d, d_k]
    scale: float,
    *,
    sparse: bool,
) -> Tensor:
    """[N, d]: each table's tokens are sought (the host waits), looked up, projected, put back.

    A single table without projection is a plain look-up, as in the original.
    """
    if len(tables) == 1 and projections[0] is None:
        return F.embedding(tokens, tables[0], sparse=sparse) * scale
    first, out = 0, None
    for table, projection in zip(tables, projections, strict=True):
        end = first + table.shape[0]
        places = ((tokens >= first) & (tokens < end)).nonzero()[:, 0]
        rows = F.embedding(tokens.index_select(0, places) - first, table, sparse=sparse)
        rows = rows if projection is None else F.linear(rows, projection)
        out = rows.new_zeros(tokens.shape[0], rows.shape[1]) if out is None else out
        out = out.index_copy(0, places, rows)
        first = end
    assert out is not None
    return out * scale


def one_table(tokens: Tensor, table: Tensor, scale: float, *, sparse: bool) -> Tensor:
    """[N, d] from a table [V, d] as wide for rare tokens as for frequent ones."""
    return F.embedding(tokens, table, sparse=sparse) * scale
