"""`torch.ops.txl_triton.adaptive_embedding_*`: projected rows of the tables, and the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels._register_adaptive import is_present
from txl_kernels.backends.triton.adaptive_buckets import Buckets, first_tokens, sort_by_cluster
from txl_kernels.backends.triton.adaptive_products import load_block, multiply_rows, sum_outer
from txl_kernels.backends.triton.launching import launch

_BLOCK_ROWS, _BLOCK_D = 16, 128


class _Runs(NamedTuple):
    """The tokens sorted by number, equal tokens in their original order."""

    token: Tensor  # [N] int64
    order: Tensor  # [N] int32: original index of the token at each sorted position
    end: Tensor  # [N] int64: position after the last token equal to this one
    number: Tensor  # [N] int64: number of distinct tokens up to this one


def adaptive_embedding_fwd(
    tokens: Tensor,  # [...] int64
    tables: Sequence[Tensor],  # [V_k, d_k]
    projections: Sequence[Tensor],  # [d, d_k], empty where absent
    scale: float,
    _sparse: bool,
) -> Tensor:
    """Returns scale · projection_k · row, [..., d] in the tables' dtype."""
    with torch.cuda.device_of(tokens):
        tables, matrices = _contiguous(tables), _given(projections)
        buckets = _buckets(tokens, tables)
        width = tables[0].shape[1] if matrices[0] is None else matrices[0].shape[0]
        out = tables[0].new_empty(*tokens.shape, width)
        multiply_rows(
            tables,
            matrices,
            out.view(tokens.numel(), width),
            buckets,
            in_row=buckets.column,
            out_row=buckets.order,
            alpha=scale,
            widths=[table.shape[1] for table in tables],
        )
    return out


def adaptive_embedding_bwd(
    dout: Tensor,  # [..., d]
    tokens: Tensor,  # [...] int64
    tables: Sequence[Tensor],
    projections: Sequence[Tensor],
    scale: float,
    sparse: bool,
    needs_grad: Sequence[bool],  # of the tables, then of the projections
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns rows, dtables and dprojections, as `_register_adaptive` describes them."""
    with torch.cuda.device_of(tokens):
        tables, matrices = _contiguous(tables), _given(projections)
        n, N = len(tables), tokens.numel()
        buckets = _buckets(tokens, tables)
        dout = dout.reshape(N, dout.shape[-1]).contiguous()
        dmatrices = [
            torch.empty_like(matrix) if needed and matrix is not None else None
            for matrix, needed in zip(matrices, needs_grad[n:], strict=True)
        ]
        sum_outer(
            [dout] * n,
            tables,
            dmatrices,
            buckets,
            left_row=buckets.order,
            right_row=buckets.column,
            alpha=scale,
        )
        shapes = [(N if sparse else table.shape[0], table.shape[1]) for table in tables]
        dtables = [
            table.new_zeros(shape) if needed else None
            for table, shape, needed in zip(tables, shapes, needs_grad[:n], strict=True)
        ]
        rows = tokens.new_full((n, N) if sparse else (0,), -1)
        if N > 0 and any(needs_grad[:n]):
            _write_dtables(dout, tokens, tables, matrices, scale, buckets, dtables, rows)
    absent = tables[0].new_empty(0)
    dtables_given = [absent if x is None else x for x in dtables]
    return rows, dtables_given, [absent if x is None else x for x in dmatrices]


def _write_dtables(
    dout: Tensor,  # [N, d]
    tokens: Tensor,
    tables: Sequence[Tensor],
    matrices: Sequence[Tensor | None],
    scale: float,
    buckets: Buckets,
    dtables: Sequence[Tensor | None],  # zeros
    rows: Tensor,  # [n_tables, N], -1, for sparse gradients; empty for dense ones
) -> None:
    """Sums the gradient rows of each distinct token, in the order of the tokens."""
    runs = _sort_by_token(tokens.flatten())
    widths = tuple(table.shape[1] for table in tables)
    # The tokens are sorted by number, so each cluster has the positions of its bucket.
    drows = dout.new_empty(dout.shape[0], max(widths), dtype=torch.float32)
    multiply_rows(
        [dout] * len(tables),
        matrices,
        drows,
        buckets,
        in_row=runs.order,
        alpha=scale,
        transposed=True,
        widths=[dout.shape[1]] * len(tables),
    )
    grid = (dout.shape[0], triton.cdiv(max(widths), _BLOCK_D))
    launch(
        _adaptive_embedding_dtables_kernel,
        grid,
        drows,
        runs.token,
        runs.end,
        runs.number,
        tuple(drows if x is None else x for x in dtables),
        rows,
        buckets.first,
        first_tokens([table.shape[0] for table in tables]),
        dout.shape[0],
        drows.stride(0),
        WIDTHS=widths,
        NEEDED=tuple(x is not None for x in dtables),
        IS_SPARSE=rows.numel() > 0,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_D=_BLOCK_D,
        num_warps=4,
    )


@triton.jit
def _adaptive_embedding_dtables_kernel(
    p_drows,  # [N, ·] float32: gradients of the tokens' table rows, sorted by token
    p_token,  # [N]
    p_end,  # [N]
    p_number,  # [N]
    dtables,  # [V_k, WIDTHS[k]], or [N, WIDTHS[k]] if IS_SPARSE; zeros
    p_rows,  # [n_tables, N], if IS_SPARSE
    p_first,  # [n_tables + 2]
    firsts,
    N,
    stride,
    WIDTHS: tl.constexpr,
    NEEDED: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of BLOCK_D columns of one table row: the sum over the tokens that index it.

    The program at a token's first sorted position sums the rows of all equal tokens in order, in
    float32; the other programs return. Deterministic. If IS_SPARSE, the row is stored at its rank
    among the table's distinct rows, and its number is stored in p_rows.
    """
    i_position = tl.program_id(0)
    token = tl.load(p_token + i_position)
    before = tl.load(p_token + i_position - 1, mask=i_position > 0, other=-1)
    if token != before:
        end = tl.load(p_end + i_position)
        o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        for k in tl.static_range(len(WIDTHS)):
            first = tl.load(p_first + k)
            inside = (i_position >= first) & (i_position < tl.load(p_first + k + 1))
            if NEEDED[k] and inside & (tl.program_id(1) * BLOCK_D < WIDTHS[k]):
                acc = tl.zeros((BLOCK_D,), tl.float32)
                for start in range(i_position, end, BLOCK_ROWS):
                    o_row = start + tl.arange(0, BLOCK_ROWS)
                    acc += tl.sum(
                        load_block(p_drows, o_row, o_row < end, o_d, WIDTHS[k], stride), 0
                    )
                row = token - firsts[k]
                if IS_SPARSE:
                    rank = tl.load(p_number + i_position) - tl.load(p_number + first)
                    tl.store(p_rows + k * N + rank, row)
                    row = rank
                p_row = dtables[k] + row * WIDTHS[k] + o_d
                tl.store(p_row, acc.to(dtables[k].dtype.element_ty), mask=o_d < WIDTHS[k])


def _sort_by_token(tokens: Tensor) -> _Runs:
    token, order = torch.sort(tokens, stable=True)
    is_first = torch.ones_like(token)
    is_first[1:] = token[1:] != token[:-1]
    end = torch.searchsorted(token, token, right=True)
    return _Runs(token, order.to(torch.int32), end, is_first.cumsum(0))


def _buckets(tokens: Tensor, tables: Sequence[Tensor]) -> Buckets:
    sizes = [table.shape[0] for table in tables]
    return sort_by_cluster("adaptive_embedding", "tokens", tokens.flatten(), sizes, None)


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


def _given(projections: Sequence[Tensor]) -> list[Tensor | None]:
    return [x.contiguous() if is_present(x) else None for x in projections]
