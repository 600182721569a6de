"""The tails of the adaptive softmax, forward: each token's log-sum-exp over its own cluster.

No logits are written to memory. All tails share one launch; `docs/mathematics.md` derives the
schedule.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.reference.adaptive_softmax import Cluster
from txl_kernels.backends.triton.adaptive_buckets import Buckets, n_tiles, tile_of
from txl_kernels.backends.triton.adaptive_configs import splits, tail_config
from txl_kernels.backends.triton.adaptive_products import load_block, multiply_rows
from txl_kernels.backends.triton.adaptive_softmax_head_rows import LOG2E, LOWEST
from txl_kernels.backends.triton.launch_table import SplitConfig, TailConfig
from txl_kernels.backends.triton.launching import launch


class Tails(NamedTuple):
    """The tails' tensors as the kernels read them, and the projected rows of their tokens."""

    x: Tensor  # [N, max(widths)]: at each sorted position projection · hidden, in hidden's dtype
    weights: tuple[Tensor, ...]  # [sizes[k], widths[k]]
    biases: tuple[Tensor, ...]  # [sizes[k]]; the weight if there is none
    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    has_bias: tuple[bool, ...]

    def options(self, config: TailConfig) -> dict[str, Any]:
        """The keyword arguments that all kernels over tiles of logits have."""
        held = (max(16, triton.next_power_of_2(width)) for width in self.widths)
        return {
            "SIZES": self.sizes,
            "WIDTHS": self.widths,
            "PADDED": tuple(min(size, config.MAX_WIDTH) for size in held),
            "HAS_BIAS": self.has_bias,
            **config.options(),
        }


def project(hidden: Tensor, tails: list[Cluster], buckets: Buckets) -> Tails:
    """Gathers and projects the tokens of every tail."""
    widths = tuple(tail.weight.shape[1] for tail in tails)
    x = hidden.new_empty(hidden.shape[0], max(widths))
    multiply_rows(
        [hidden] * len(tails),
        [tail.projection for tail in tails],
        x,
        buckets,
        first_cluster=1,
        in_row=buckets.order,
        widths=[hidden.shape[1]] * len(tails),
    )
    return Tails(
        x,
        tuple(tail.weight for tail in tails),
        tuple(tail.weight if tail.bias is None else tail.bias for tail in tails),
        tuple(tail.weight.shape[0] for tail in tails),
        widths,
        tuple(tail.bias is not None for tail in tails),
    )


@triton.jit
def split_columns(
    p_first, SIZES: tl.constexpr, BLOCK_V: tl.constexpr, N_PARTIALS: tl.constexpr, MIN: tl.constexpr
):
    """The number of columns of one program: a multiple of BLOCK_V, at least MIN.

    All logits divided by N_PARTIALS rows of partial results: each row then stands for about the
    same number of logits, and all splits of all tokens fit in N_PARTIALS + N rows.
    """
    n_logits = tl.zeros((), tl.int64)
    for k in tl.static_range(len(SIZES)):
        n_tokens = tl.load(p_first + k + 2) - tl.load(p_first + k + 1)
        n_logits += n_tokens.to(tl.int64) * SIZES[k]
    columns = tl.maximum((n_logits + N_PARTIALS - 1) // N_PARTIALS, MIN)
    return ((columns + BLOCK_V - 1) // BLOCK_V * BLOCK_V).to(tl.int32)


@triton.jit
def split_of(i_program, p_first, columns, SIZES: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The share of a program: a tile of one tail's tokens, and a range of its columns.

    Tiles of tokens vary fastest, so that neighbouring programs read the same weights. Returns the
    tail (-1: none), the tile's first position, the end of the tail's positions, the range's first
    column, and the partial row of position 0; that of position n is n rows after it.
    """
    tail = -1
    start = 0
    end = 0
    column = 0
    partial = 0
    n_before = 0
    n_partials = 0
    for k in tl.static_range(len(SIZES)):
        first = tl.load(p_first + k + 1)
        last = tl.load(p_first + k + 2)
        n_tiles = tl.cdiv(last - first, BLOCK_ROWS)
        n_splits = tl.cdiv(SIZES[k], columns)
        i_here = i_program - n_before
        if (i_here >= 0) & (i_here < n_tiles * n_splits):
            i_split = i_here // n_tiles
            tail = k
            start = first + i_here % n_tiles * BLOCK_ROWS
            end = last
            column = i_split * columns
            partial = n_partials + i_split * (last - first) - first
        n_before += n_tiles * n_splits
        n_partials += (last - first) * n_splits
    return tail, start, end, column, partial


@triton.jit
def wide_product(
    p_left,
    o_left,
    m_left,
    stride_left,
    p_right,
    o_right,
    m_right,
    stride_right,
    WIDTH: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """float32 [left, right] of left · rightᵀ, in pieces of a width that does not fit a tile."""
    acc = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        o_d = start + tl.arange(0, BLOCK_WIDTH)
        b_left = load_block(p_left, o_left, m_left, o_d, WIDTH, stride_left)
        b_right = load_block(p_right, o_right, m_right, o_d, WIDTH, stride_right)
        acc = tl.dot(b_left, tl.trans(b_right), acc, input_precision="ieee")
    return acc


@triton.jit
def _tail_lse_tile(
    p_x,
    p_weight,
    p_bias,
    o_position,
    m_row,
    target,
    first_column,
    last_column,
    stride_x,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Online over a range of columns: the largest logit, Σ exp(logit - largest), the target's."""
    largest = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    at_target = tl.zeros((BLOCK_ROWS,), tl.float32)
    if WIDTH <= MAX_WIDTH:
        o_d = tl.arange(0, PADDED)
        b_x = load_block(p_x, o_position, m_row, o_d, WIDTH, stride_x)
    for start in range(first_column, last_column, BLOCK_V):
        o_column = start + tl.arange(0, BLOCK_V)
        m_column = o_column < last_column
        if WIDTH <= MAX_WIDTH:
            b_weight = load_block(p_weight, o_column, m_column, o_d, WIDTH, WIDTH)
            logits = tl.dot(b_x, tl.trans(b_weight), input_precision="ieee")
        else:
            logits = wide_product(
                p_x, o_position, m_row, stride_x, p_weight, o_column, m_column, WIDTH,
                WIDTH, BLOCK_ROWS, BLOCK_V, BLOCK_WIDTH,
            )  # fmt: skip
        if HAS_BIAS:
            b_bias = tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)
            logits += b_bias[None, :]
        at_target += tl.sum(tl.where(o_column[None, :] == target[:, None], logits, 0.0), 1)
        logits = tl.where(m_column[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        total *= tl.exp2((largest - larger) * LOG2E)
        total += tl.sum(tl.exp2((logits - larger[:, None]) * LOG2E), 1)
        largest = larger
    return largest, total, at_target


@triton.jit
def _adaptive_tails_fwd_kernel(
    p_x,  # [N, ·]
    weights,
    biases,
    p_column,  # [N] int32: the target's number within its tail, by sorted position
    p_first,  # [n_tails + 2]
    p_largest,  # [N_PARTIALS + N] float32
    p_total,  # [N_PARTIALS + N] float32
    p_at_target,  # [N] float32
    stride_x,
    SIZES: tl.constexpr,
    WIDTHS: tl.constexpr,
    PADDED: tl.constexpr,  # columns of a block that holds a row, or as much of it as fits
    HAS_BIAS: tl.constexpr,
    N_PARTIALS: tl.constexpr,
    MIN_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MAX_WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Partial log-sum-exp of one tile of a tail's tokens over a range of the tail's columns.

    A program holds its tokens' rows (up to MAX_WIDTH) and streams the range in tiles [BLOCK_ROWS,
    BLOCK_V]; logits, maximum and sum are float32 and stay in registers. Writes one (largest, total)
    per token and range, and the target's logit where the range holds it: no two programs write the
    same element, and the partials are joined in order, so the result is deterministic.
    """
    columns = split_columns(p_first, SIZES, BLOCK_V, N_PARTIALS, MIN_COLUMNS)
    tail, start, end, first_column, partial = split_of(
        tl.program_id(0), p_first, columns, SIZES, BLOCK_ROWS
    )
    o_position = start + tl.arange(0, BLOCK_ROWS)
    m_row = o_position < end
    target = tl.load(p_column + o_position, mask=m_row, other=-1)
    for k in tl.static_range(len(SIZES)):
        if tail == k:
            last_column = tl.minimum(first_column + columns, SIZES[k])
            largest, total, at_target = _tail_lse_tile(
                p_x, weights[k], biases[k], o_position, m_row, target, first_column, last_column,
                stride_x, WIDTHS[k], PADDED[k], HAS_BIAS[k],
                BLOCK_ROWS, BLOCK_V, MAX_WIDTH, BLOCK_WIDTH,
            )  # fmt: skip
            tl.store(p_largest + partial + o_position, largest, mask=m_row)
            tl.store(p_total + partial + o_position, total, mask=m_row)
            m_target = m_row & (target >= first_column) & (target < last_column)
            tl.store(p_at_target + o_position, at_target, mask=m_target)


@triton.jit
def _adaptive_tails_join_kernel(
    p_largest,  # [N_PARTIALS + N]
    p_total,  # [N_PARTIALS + N]
    p_at_target,  # [N]
    p_order,  # [N]
    p_first,  # [n_tails + 2]
    p_nll,  # [N], token order; holds the head's part
    p_lse_largest,  # [N], token order
    p_log_sum,  # [N], token order
    SIZES: tl.constexpr,
    N_PARTIALS: tl.constexpr,
    MIN_COLUMNS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Joins the partial sums of BLOCK_ROWS tokens of one tail, in the order of their columns.

    Writes each token's log-sum-exp and adds the tail's part to its loss, both in token order and
    in float32; a token belongs to one program.
    """
    columns = split_columns(p_first, SIZES, BLOCK_V, N_PARTIALS, MIN_COLUMNS)
    cluster, start, end = tile_of(tl.program_id(0), p_first, 1, 1 + len(SIZES), BLOCK_ROWS)
    o_position = start + tl.arange(0, BLOCK_ROWS)
    m_row = o_position < end
    partial = 0
    n_before = 0
    n_splits = 0
    stride = 0
    for k in tl.static_range(len(SIZES)):
        first = tl.load(p_first + k + 1)
        n_tokens = tl.load(p_first + k + 2) - first
        n_here = tl.cdiv(SIZES[k], columns)
        if cluster == k + 1:
            partial = n_before - first
            n_splits = n_here
            stride = n_tokens
        n_before += n_tokens * n_here
    largest = tl.full((BLOCK_ROWS,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for i_split in range(n_splits):
        o_partial = partial + i_split * stride + o_position
        new = tl.load(p_largest + o_partial, mask=m_row, other=0.0)
        larger = tl.maximum(largest, new)
        total *= tl.exp2((largest - larger) * LOG2E)
        total += tl.load(p_total + o_partial, mask=m_row, other=1.0) * tl.exp2(
            (new - larger) * LOG2E
        )
        largest = larger
    log_sum = tl.log(tl.where(m_row, total, 1.0))
    o_token = tl.load(p_order + o_position, mask=m_row, other=0)
    tl.store(p_lse_largest + o_token, largest, mask=m_row)
    tl.store(p_log_sum + o_token, log_sum, mask=m_row)
    nll = tl.load(p_nll + o_token, mask=m_row, other=0.0)
    at_target = tl.load(p_at_target + o_position, mask=m_row, other=0.0)
    tl.store(p_nll + o_token, nll + ((largest - at_target) + log_sum), mask=m_row)


def n_programs(N: int, sizes: tuple[int, ...], config: TailConfig, split: SplitConfig) -> int:
    """The most programs that the tokens of a kernel with `split_of` may need.

    Σ tiles_k · splits_k, with tiles_k ≤ n_k / BLOCK_ROWS + 1 and splits_k ≤ sizes_k / columns + 1.
    """
    n_tiles = -(-(split.N_PARTIALS + N) // config.BLOCK_ROWS)
    return n_tiles + -(-sum(sizes) // split.MIN_COLUMNS) + len(sizes)


def add_tails_nll(nll: Tensor, lse: Tensor, tails: Tails, buckets: Buckets) -> None:
    """Adds the tails' part of the loss to `nll` [N]; writes their tokens' `lse` [2, N]."""
    N, device = nll.shape[0], nll.device
    config, split = tail_config("fwd", device, tails.x.dtype, tails.widths), splits("fwd", device)
    largest, total = nll.new_empty(2, split.N_PARTIALS + N)
    at_target = torch.empty_like(nll)
    launch(
        _adaptive_tails_fwd_kernel, (n_programs(N, tails.sizes, config, split),),
        tails.x, tails.weights, tails.biases, buckets.column, buckets.first,
        largest, total, at_target, tails.x.stride(0),
        **tails.options(config), **split._asdict(),
    )  # fmt: skip
    rows = 128
    launch(
        _adaptive_tails_join_kernel, (n_tiles(N, len(tails.sizes), rows),),
        largest, total, at_target, buckets.order, buckets.first, nll, *lse,
        SIZES=tails.sizes, **split._asdict(), BLOCK_V=config.BLOCK_V, BLOCK_ROWS=rows, num_warps=4,
    )  # fmt: skip
