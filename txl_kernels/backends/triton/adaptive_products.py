"""Products with one matrix per cluster, of rows that are gathered and scattered on the way.

Projections of the adaptive softmax and of the adaptive embedding, forward and backward. All
clusters share one launch, as large as the tokens may need; programs without work return at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.triton.adaptive_buckets import Buckets, n_tiles, tile_of
from txl_kernels.backends.triton.adaptive_configs import product_config
from txl_kernels.backends.triton.launching import launch


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which gradients of `x` are summed and passed on.

    float32 for float16, whose range does not hold every gradient before its factor is known.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


@triton.jit
def dot(left, right, acc):
    """acc + left · right; `left` may be a float32 gradient beside 16-bit values.

    It is rounded to bfloat16, which has its range. Beside float16 both go through TF32: that has
    the range of float32 and the 11 bits of float16, so that `right` is exact.
    """
    if left.dtype == right.dtype:
        acc = tl.dot(left, right, acc, input_precision="ieee")
    elif right.dtype == tl.float16:
        acc = tl.dot(left, right.to(tl.float32), acc, input_precision="tf32")
    else:
        acc = tl.dot(left.to(right.dtype), right, acc, input_precision="ieee")
    return acc


@triton.jit
def load_block(p, o_row, m_row, o_column, width, stride):
    """[rows, columns] of a matrix, `stride` from row to row; 0 where masked and from width on."""
    return tl.load(
        p + o_row.to(tl.int64)[:, None] * stride + o_column[None, :],
        mask=m_row[:, None] & (o_column < width)[None, :],
        other=0.0,
    )


@triton.jit
def _rows_product(
    p_input,
    o_row,
    m_row,
    o_out,
    p_matrix,
    stride_input,
    WIDTH: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """float32 [rows, out]: rows o_row of the input times one cluster's matrix."""
    acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, WIDTH, BLOCK_IN):
        o_in = start + tl.arange(0, BLOCK_IN)
        b_input = load_block(p_input, o_row, m_row, o_in, WIDTH, stride_input)
        if IS_TRANSPOSED:
            b_matrix = load_block(p_matrix, o_in, o_in < WIDTH, o_out, WIDTH_OUT, WIDTH_OUT)
            acc = dot(b_input, b_matrix, acc)
        else:
            b_matrix = load_block(p_matrix, o_out, o_out < WIDTH_OUT, o_in, WIDTH, WIDTH)
            acc = dot(b_input, tl.trans(b_matrix), acc)
    return acc


@triton.jit
def _adaptive_rows_kernel(
    inputs,  # per cluster [·, WIDTHS_IN[k]]
    matrices,  # per cluster [WIDTHS_OUT[k], WIDTHS_IN[k]], the other way round if IS_TRANSPOSED
    p_out,  # [N, max(WIDTHS_OUT)]
    p_in_row,  # [N] int32: which input row a sorted position reads, if GATHERS; else its own
    p_out_row,  # [N] int32: which output row it writes, if SCATTERS; else its own
    p_first,  # [FIRST + n_clusters + 1] int32
    alpha,
    strides_in,
    stride_out,
    FIRST: tl.constexpr,
    WIDTHS_IN: tl.constexpr,
    WIDTHS_OUT: tl.constexpr,
    HAS_MATRIX: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    GATHERS: tl.constexpr,
    SCATTERS: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """out[row] (+)= alpha · matrix_k · input[row] for the tokens of clusters FIRST, FIRST + 1, …

    One program: BLOCK_ROWS tokens of one cluster and BLOCK_OUT columns, which no other writes; the
    inner width in order. A cluster without a matrix has its rows copied. Sums are float32, rounded
    once. Programs without a tile of tokens return at once. Deterministic: no sum is shared.
    """
    cluster, start, end = tile_of(
        tl.program_id(0), p_first, FIRST, FIRST + len(WIDTHS_IN), BLOCK_ROWS
    )
    o_position = start + tl.arange(0, BLOCK_ROWS)
    m_row = o_position < end
    o_in_row = o_position
    o_out_row = o_position
    if GATHERS:
        o_in_row = tl.load(p_in_row + o_position, mask=m_row, other=0)
    if SCATTERS:
        o_out_row = tl.load(p_out_row + o_position, mask=m_row, other=0)
    o_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    p_tile = p_out + o_out_row.to(tl.int64)[:, None] * stride_out + o_out[None, :]
    for k in tl.static_range(len(WIDTHS_IN)):
        if (cluster == FIRST + k) & (tl.program_id(1) * BLOCK_OUT < WIDTHS_OUT[k]):
            if HAS_MATRIX[k]:
                acc = _rows_product(
                    inputs[k],
                    o_in_row,
                    m_row,
                    o_out,
                    matrices[k],
                    strides_in[k],
                    WIDTHS_IN[k],
                    WIDTHS_OUT[k],
                    IS_TRANSPOSED,
                    BLOCK_ROWS,
                    BLOCK_OUT,
                    BLOCK_IN,
                )
            else:
                acc = load_block(
                    inputs[k], o_in_row, m_row, o_out, WIDTHS_OUT[k], strides_in[k]
                ).to(tl.float32)
            acc *= alpha
            m_tile = m_row[:, None] & (o_out < WIDTHS_OUT[k])[None, :]
            if ADDS:
                acc += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
            tl.store(p_tile, acc.to(p_out.dtype.element_ty), mask=m_tile)


def multiply_rows(
    inputs: Sequence[Tensor],  # per cluster [·, in_k]
    matrices: Sequence[Tensor | None],  # per cluster [out_k, in_k]; in_k = out_k where None
    out: Tensor,  # [N, ≥ max(out_k)]
    buckets: Buckets,
    *,
    first_cluster: int = 0,
    in_row: Tensor | None = None,
    out_row: Tensor | None = None,
    alpha: float = 1.0,
    transposed: bool = False,
    widths: Sequence[int],
    adds: bool = False,
) -> None:
    """Row by row of the sorted tokens: out[out_row] (+)= alpha · matrix_k · inputs_k[in_row].

    `widths` are the inner ones, for clusters without a matrix; with `transposed` the matrices are
    [in_k, out_k].
    """
    N = out.shape[0]
    if out.numel() == 0 or not inputs:
        return
    side = 1 if transposed else 0
    widths_out = [
        width if matrix is None else matrix.shape[side]
        for width, matrix in zip(widths, matrices, strict=True)
    ]
    config = product_config(out.device, inputs[0].dtype, [*widths, *widths_out])
    grid = (
        n_tiles(N, len(inputs), config.BLOCK_ROWS),
        triton.cdiv(max(widths_out), config.BLOCK_OUT),
    )
    launch(
        _adaptive_rows_kernel,
        grid,
        tuple(inputs),
        tuple(x if matrix is None else matrix for x, matrix in zip(inputs, matrices, strict=True)),
        out,
        buckets.order if in_row is None else in_row,
        buckets.order if out_row is None else out_row,
        buckets.first,
        alpha,
        tuple(x.stride(0) for x in inputs),
        out.stride(0),
        FIRST=first_cluster,
        WIDTHS_IN=tuple(widths),
        WIDTHS_OUT=tuple(widths_out),
        HAS_MATRIX=tuple(matrix is not None for matrix in matrices),
        IS_TRANSPOSED=transposed,
        GATHERS=in_row is not None,
        SCATTERS=out_row is not None,
        ADDS=adds,
        **config.options(),
    )


@triton.jit
def _adaptive_outer_kernel(
    lefts,  # per cluster [·, WIDTHS_LEFT[k]]
    rights,  # per cluster [·, WIDTHS_RIGHT[k]]
    outs,  # per cluster [WIDTHS_LEFT[k], WIDTHS_RIGHT[k]]
    p_left_row,
    p_right_row,
    p_first,
    alpha,
    strides_left,
    strides_right,
    FIRST: tl.constexpr,
    WIDTHS_LEFT: tl.constexpr,
    WIDTHS_RIGHT: tl.constexpr,
    TILES: tl.constexpr,  # tiles of the clusters before, per cluster, and of all
    GATHERS_LEFT: tl.constexpr,
    GATHERS_RIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """out_k = alpha · Σ left[row]ᵀ right_k[row] over the tokens of cluster FIRST + k.

    One program owns a tile [BLOCK_OUT, BLOCK_IN] of one cluster's matrix and adds its tokens in
    their sorted order, in float32: deterministic. A cluster without tokens gets zeros.
    """
    i_tile = tl.program_id(0)
    for k in tl.static_range(len(WIDTHS_LEFT)):
        if (i_tile >= TILES[k]) & (i_tile < TILES[k + 1]):
            n_right = tl.cdiv(WIDTHS_RIGHT[k], BLOCK_IN)
            o_left = (i_tile - TILES[k]) // n_right * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            o_right = (i_tile - TILES[k]) % n_right * BLOCK_IN + tl.arange(0, BLOCK_IN)
            end = tl.load(p_first + FIRST + k + 1)
            acc = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
            for start in range(tl.load(p_first + FIRST + k), end, BLOCK_ROWS):
                o_position = start + tl.arange(0, BLOCK_ROWS)
                m_row = o_position < end
                o_left_row = o_position
                o_right_row = o_position
                if GATHERS_LEFT:
                    o_left_row = tl.load(p_left_row + o_position, mask=m_row, other=0)
                if GATHERS_RIGHT:
                    o_right_row = tl.load(p_right_row + o_position, mask=m_row, other=0)
                b_left = load_block(
                    lefts[k], o_left_row, m_row, o_left, WIDTHS_LEFT[k], strides_left[k]
                )
                b_right = load_block(
                    rights[k], o_right_row, m_row, o_right, WIDTHS_RIGHT[k], strides_right[k]
                )
                acc = dot(tl.trans(b_left), b_right, acc)
            p_tile = outs[k] + o_left[:, None] * WIDTHS_RIGHT[k] + o_right[None, :]
            m_tile = (o_left < WIDTHS_LEFT[k])[:, None] & (o_right < WIDTHS_RIGHT[k])[None, :]
            tl.store(p_tile, (acc * alpha).to(outs[k].dtype.element_ty), mask=m_tile)


def sum_outer(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    outs: Sequence[Tensor | None],  # per cluster [left_k, right_k], written; None: left out
    buckets: Buckets,
    *,
    first_cluster: int = 0,
    left_row: Tensor | None = None,
    right_row: Tensor | None = None,
    alpha: float = 1.0,
) -> None:
    """Per cluster: outs_k = alpha · Σ lefts_k[left_row]ᵀ rights_k[right_row] over its tokens."""
    config = product_config(buckets.order.device, rights[0].dtype)
    tiles = [0]
    for out in outs:
        m, n = (0, 0) if out is None else out.shape
        tiles.append(tiles[-1] + triton.cdiv(m, config.BLOCK_OUT) * triton.cdiv(n, config.BLOCK_IN))
    if tiles[-1] == 0:
        return
    launch(
        _adaptive_outer_kernel,
        (tiles[-1],),
        tuple(lefts),
        tuple(rights),
        tuple(left if out is None else out for left, out in zip(lefts, outs, strict=True)),
        buckets.order if left_row is None else left_row,
        buckets.order if right_row is None else right_row,
        buckets.first,
        alpha,
        tuple(left.stride(0) for left in lefts),
        tuple(right.stride(0) for right in rights),
        FIRST=first_cluster,
        WIDTHS_LEFT=tuple(1 if out is None else out.shape[0] for out in outs),
        WIDTHS_RIGHT=tuple(1 if out is None else out.shape[1] for out in outs),
        TILES=tuple(tiles),
        GATHERS_LEFT=left_row is not None,
        GATHERS_RIGHT=right_row is not None,
        **config.options(),
    )
