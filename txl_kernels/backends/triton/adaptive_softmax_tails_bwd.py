"""The tails of the adaptive softmax, backward: one program owns each sum and adds it in order.

Logits are recomputed, once for the rows' gradient and once for the weights'.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.triton.adaptive_buckets import Buckets, n_tiles, tile_of
from txl_kernels.backends.triton.adaptive_configs import splits, tail_config
from txl_kernels.backends.triton.adaptive_products import dot, load_block, sum_dtype
from txl_kernels.backends.triton.adaptive_softmax_head_rows import LOG2E
from txl_kernels.backends.triton.adaptive_softmax_tails import (
    Tails,
    n_programs,
    split_columns,
    split_of,
    wide_product,
)
from txl_kernels.backends.triton.launching import launch


@triton.jit
def _softmax(logits, largest, log_sum):
    """exp(logits) / Σ exp, from the two parts of a log-sum-exp."""
    # The forward kernel's tiles may have rounded the largest logit differently.
    return tl.exp2((tl.minimum(logits - largest, 0.0) - log_sum) * LOG2E)


@triton.jit
def _tail_dx_tile(
    p_x,
    p_weight,
    p_bias,
    o_position,
    m_row,
    target,
    largest,
    log_sum,
    factor,
    first_column,
    last_column,
    o_out,
    stride_x,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """float32 [rows, o_out] of (softmax - onehot) · factor · weight, over a range of columns."""
    if WIDTH <= MAX_WIDTH:
        b_x = load_block(p_x, o_position, m_row, o_out, WIDTH, stride_x)
    dx = tl.zeros((BLOCK_ROWS, PADDED), tl.float32)
    for start in range(first_column, last_column, BLOCK_V):
        o_column = start + tl.arange(0, BLOCK_V)
        m_column = o_column < last_column
        b_weight = load_block(p_weight, o_column, m_column, o_out, WIDTH, WIDTH)
        if WIDTH <= MAX_WIDTH:
            logits = tl.dot(b_x, tl.trans(b_weight), input_precision="ieee")
        else:
            logits = wide_product(
                p_x, o_position, m_row, stride_x, p_weight, o_column, m_column, WIDTH,
                WIDTH, BLOCK_ROWS, BLOCK_V, BLOCK_WIDTH,
            )  # fmt: skip
        if HAS_BIAS:
            b_bias = tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)
            logits += b_bias[None, :]
        dlogits = _softmax(logits, largest[:, None], log_sum[:, None])
        dlogits -= (o_column[None, :] == target[:, None]).to(tl.float32)
        dlogits = tl.where(m_column[None, :], dlogits * factor[:, None], 0.0)
        dx = dot(dlogits, b_weight, dx)
    return dx


@triton.jit
def _adaptive_tails_dx_kernel(
    p_x,  # [N, ·]
    weights,
    biases,
    p_order,  # [N]
    p_column,  # [N]
    p_first,  # [n_tails + 2]
    p_largest,  # [N], token order
    p_log_sum,  # [N], token order
    p_factor,  # [N], token order, or one number
    p_partial,  # [N_PARTIALS + N, max(WIDTHS)] float32
    stride_x,
    SIZES: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr,
    N_PARTIALS: tl.constexpr,
    MIN_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Partial gradient of one tile of a tail's projected rows, over a range of its columns.

    Streams the range in tiles [BLOCK_ROWS, BLOCK_V]: recomputes logits and multiplies their
    gradient by the weights; the sum is float32 and stays in registers, up to MAX_WIDTH of the width
    (the second axis of the grid goes over wider ones). Each partial row has one writer and the
    partials are joined in order, so the result is deterministic.
    """
    columns = split_columns(p_first, SIZES, BLOCK_V, N_PARTIALS, MIN_COLUMNS)
    tail, start, end, first_column, partial = split_of(
        tl.program_id(0), p_first, columns, SIZES, BLOCK_ROWS
    )
    o_position = start + tl.arange(0, BLOCK_ROWS)
    m_row = o_position < end
    target = tl.load(p_column + o_position, mask=m_row, other=-1)
    o_token = tl.load(p_order + o_position, mask=m_row, other=0)
    largest = tl.load(p_largest + o_token, mask=m_row, other=0.0)
    log_sum = tl.load(p_log_sum + o_token, mask=m_row, other=0.0)
    factor = m_row.to(tl.float32)
    if IS_PER_TOKEN:
        factor = tl.load(p_factor + o_token, mask=m_row, other=0.0)
    for k in tl.static_range(len(SIZES)):
        if (tail == k) & (tl.program_id(1) * MAX_WIDTH < WIDTHS[k]):
            o_out = tl.program_id(1) * MAX_WIDTH + tl.arange(0, PADDED[k])
            last_column = tl.minimum(first_column + columns, SIZES[k])
            dx = _tail_dx_tile(
                p_x, weights[k], biases[k], o_position, m_row, target, largest, log_sum, factor,
                first_column, last_column, o_out, stride_x, WIDTHS[k], PADDED[k], HAS_BIAS[k],
                BLOCK_ROWS, BLOCK_V, MAX_WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            o_partial = (partial + o_position).to(tl.int64)[:, None] * stride_x
            m_out = m_row[:, None] & (o_out < WIDTHS[k])[None, :]
            tl.store(p_partial + o_partial + o_out[None, :], dx, mask=m_out)


@triton.jit
def _adaptive_tails_dx_join_kernel(
    p_partial,  # [N_PARTIALS + N, max(WIDTHS)] float32
    p_first,  # [n_tails + 2]
    p_factor,  # one number, unless IS_PER_TOKEN
    p_dx,  # [N, max(WIDTHS)]
    stride_x,
    SIZES: tl.constexpr,
    WIDTHS: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr,
    N_PARTIALS: tl.constexpr,
    MIN_COLUMNS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Joins the partial gradients of BLOCK_ROWS rows of one tail, in the order of their columns.

    Sums are float32, rounded once to dx's dtype.
    """
    columns = split_columns(p_first, SIZES, BLOCK_V, N_PARTIALS, MIN_COLUMNS)
    cluster, start, end = tile_of(tl.program_id(0), p_first, 1, 1 + len(SIZES), BLOCK_ROWS)
    o_position = start + tl.arange(0, BLOCK_ROWS)
    m_row = o_position < end
    o_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    factor = 1.0
    if not IS_PER_TOKEN:
        factor = tl.load(p_factor)
    n_before = 0
    for k in tl.static_range(len(SIZES)):
        first = tl.load(p_first + k + 1)
        n_tokens = tl.load(p_first + k + 2) - first
        n_splits = tl.cdiv(SIZES[k], columns)
        if (cluster == k + 1) & (tl.program_id(1) * BLOCK_OUT < WIDTHS[k]):
            dx = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
            for i_split in range(n_splits):
                o_partial = n_before + i_split * n_tokens - first + o_position
                dx += load_block(p_partial, o_partial, m_row, o_out, WIDTHS[k], stride_x)
            p_tile = p_dx + o_position.to(tl.int64)[:, None] * stride_x + o_out[None, :]
            m_tile = m_row[:, None] & (o_out < WIDTHS[k])[None, :]
            tl.store(p_tile, (dx * factor).to(p_dx.dtype.element_ty), mask=m_tile)
        n_before += n_tokens * n_splits


@triton.jit
def _tail_dweight_tile(
    p_x,
    p_weight,
    p_bias,
    p_order,
    p_column,
    p_largest,
    p_log_sum,
    p_factor,
    first,
    end,
    o_column,
    o_out,
    stride_x,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """float32 [columns, o_out] and [columns]: gradients of weight and bias, over all tokens."""
    m_column = o_column < SIZE
    dweight = tl.zeros((BLOCK_V, PADDED), tl.float32)
    dbias = tl.zeros((BLOCK_V,), tl.float32)
    if WIDTH <= MAX_WIDTH:
        b_weight = load_block(p_weight, o_column, m_column, o_out, WIDTH, WIDTH)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)
    for start in range(first, end, BLOCK_ROWS):
        o_position = start + tl.arange(0, BLOCK_ROWS)
        m_row = o_position < end
        o_token = tl.load(p_order + o_position, mask=m_row, other=0)
        target = tl.load(p_column + o_position, mask=m_row, other=-1)
        largest = tl.load(p_largest + o_token, mask=m_row, other=0.0)
        log_sum = tl.load(p_log_sum + o_token, mask=m_row, other=0.0)
        b_x = load_block(p_x, o_position, m_row, o_out, WIDTH, stride_x)
        if WIDTH <= MAX_WIDTH:
            logits = tl.dot(b_weight, tl.trans(b_x), input_precision="ieee")
        else:
            logits = wide_product(
                p_weight, o_column, m_column, WIDTH, p_x, o_position, m_row, stride_x,
                WIDTH, BLOCK_V, BLOCK_ROWS, BLOCK_WIDTH,
            )  # fmt: skip
        if HAS_BIAS:
            logits += b_bias[:, None]
        dlogits = _softmax(logits, largest[None, :], log_sum[None, :])
        dlogits -= (o_column[:, None] == target[None, :]).to(tl.float32)
        if IS_PER_TOKEN:
            dlogits *= tl.load(p_factor + o_token, mask=m_row, other=0.0)[None, :]
        dlogits = tl.where(m_row[None, :], dlogits, 0.0)
        if HAS_BIAS:
            dbias += tl.sum(dlogits, 1)
        dweight = dot(dlogits, b_x, dweight)
    if not IS_PER_TOKEN:
        factor = tl.load(p_factor)
        dweight *= factor
        dbias *= factor
    return dweight, dbias


@triton.jit
def _adaptive_tails_dweight_kernel(
    p_x,  # [N, ·]
    weights,
    biases,
    p_order,  # [N]
    p_column,  # [N]
    p_first,  # [n_tails + 2]
    p_largest,  # [N], token order
    p_log_sum,  # [N], token order
    p_factor,  # [N], token order, or one number
    dweights,  # like weights
    dbiases,  # like biases
    stride_x,
    SIZES: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr,
    TILES: tl.constexpr,  # tiles of columns of the tails before, per tail, and of all
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Gradient of BLOCK_V rows of one tail's weight (up to MAX_WIDTH wide), and of its bias.

    The program holds its rows of the weight and goes through the tail's tokens in sorted order,
    BLOCK_ROWS at a time: it recomputes logits and multiplies their gradient by the tokens' rows. It
    owns its sums, in float32 registers: deterministic. A tail without tokens gets zeros.
    """
    i_tile = tl.program_id(0)
    for k in tl.static_range(len(SIZES)):
        m_tile = (i_tile >= TILES[k]) & (i_tile < TILES[k + 1])
        # A tail of width 0 has a bias all the same.
        if m_tile & (tl.program_id(1) * MAX_WIDTH < max(WIDTHS[k], 1)):
            o_column = (i_tile - TILES[k]) * BLOCK_V + tl.arange(0, BLOCK_V)
            o_out = tl.program_id(1) * MAX_WIDTH + tl.arange(0, PADDED[k])
            first = tl.load(p_first + k + 1)
            end = tl.load(p_first + k + 2)
            dweight, dbias = _tail_dweight_tile(
                p_x, weights[k], biases[k], p_order, p_column, p_largest, p_log_sum, p_factor,
                first, end, o_column, o_out, stride_x, SIZES[k], WIDTHS[k], PADDED[k], HAS_BIAS[k],
                IS_PER_TOKEN, BLOCK_ROWS, BLOCK_V, MAX_WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            m_column = o_column < SIZES[k]
            m_out = m_column[:, None] & (o_out < WIDTHS[k])[None, :]
            o_weight = o_column.to(tl.int64)[:, None] * WIDTHS[k] + o_out[None, :]
            dtype = dweights[k].dtype.element_ty
            tl.store(dweights[k] + o_weight, dweight.to(dtype), mask=m_out)
            if HAS_BIAS[k]:
                p_dbias = dbiases[k] + o_column
                m_dbias = m_column & (tl.program_id(1) == 0)
                tl.store(p_dbias, dbias.to(dbiases[k].dtype.element_ty), mask=m_dbias)


def tails_dx(tails: Tails, buckets: Buckets, lse: Tensor, factor: Tensor) -> Tensor:
    """Gradient of the projected rows, times `factor`: per token [N], or one number [].

    `lse` is [2, N], in token order.
    """
    N, widest = tails.x.shape
    config, split = (
        tail_config("dx", lse.device, tails.x.dtype, tails.widths),
        splits("dx", lse.device),
    )
    partial = lse.new_empty(split.N_PARTIALS + N, widest)
    per_token = factor.dim() == 1
    grid = (n_programs(N, tails.sizes, config, split), triton.cdiv(widest, config.MAX_WIDTH))
    launch(
        _adaptive_tails_dx_kernel, grid,
        tails.x, tails.weights, tails.biases, buckets.order, buckets.column, buckets.first,
        *lse, factor, partial, tails.x.stride(0),
        IS_PER_TOKEN=per_token, **tails.options(config), **split._asdict(),
    )  # fmt: skip
    dx = torch.empty_like(tails.x, dtype=sum_dtype(tails.x))
    rows, width = 32, 64
    grid = (n_tiles(N, len(tails.sizes), rows), triton.cdiv(widest, width))
    launch(
        _adaptive_tails_dx_join_kernel, grid,
        partial, buckets.first, factor, dx, tails.x.stride(0),
        SIZES=tails.sizes, WIDTHS=tails.widths, IS_PER_TOKEN=per_token,
        **split._asdict(), BLOCK_V=config.BLOCK_V, BLOCK_ROWS=rows, BLOCK_OUT=width, num_warps=4,
    )  # fmt: skip
    return dx


def write_tails_dweight(
    tails: Tails,
    buckets: Buckets,
    lse: Tensor,  # [2, N], token order
    factor: Tensor,  # [N], token order, or []
    dweights: list[Tensor | None],
    dbiases: list[Tensor | None],
) -> None:
    """Writes the gradients of the tails' weights and biases, times `factor`, where not None."""
    config = tail_config("dweight", lse.device, tails.x.dtype, tails.widths)
    tiles = [0]
    outs, bias_outs = [], []
    for weight, bias, dweight, dbias, has_bias in zip(
        tails.weights, tails.biases, dweights, dbiases, tails.has_bias, strict=True
    ):
        needed = dweight is not None or dbias is not None
        tiles.append(tiles[-1] + (triton.cdiv(weight.shape[0], config.BLOCK_V) if needed else 0))
        outs.append(torch.empty_like(weight) if needed and dweight is None else dweight)
        bias_outs.append(torch.empty_like(bias) if needed and has_bias and dbias is None else dbias)
    if tiles[-1] == 0:
        return
    grid = (tiles[-1], triton.cdiv(max(*tails.widths, 1), config.MAX_WIDTH))
    launch(
        _adaptive_tails_dweight_kernel, grid,
        tails.x, tails.weights, tails.biases, buckets.order, buckets.column, buckets.first,
        *lse, factor,
        tuple(tails.x if out is None else out for out in outs),
        tuple(tails.x if out is None else out for out in bias_outs),
        tails.x.stride(0),
        IS_PER_TOKEN=factor.dim() == 1, TILES=tuple(tiles), **tails.options(config),
    )  # fmt: skip
