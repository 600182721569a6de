"""`rel_shift` in Triton, forward and backward: rows copied with a shift of their own."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.triton.launching import launch

_BLOCK_I = 4
_BLOCK_C = 256


def rel_shift_fwd(x: Tensor, n_keys: int, offset: int) -> Tensor:
    """out[..., i, j] = x[..., i, j - i + offset]: [..., Tq, R] -> [..., Tq, n_keys]."""
    return _shifted(x, n_keys, offset, step=-1)


def rel_shift_bwd(dout: Tensor, n_rows: int, offset: int) -> Tensor:
    """dx[..., i, m] = dout[..., i, m + i - offset]: [..., Tq, n_keys] -> [..., Tq, R]."""
    return _shifted(dout, n_rows, -offset, step=1)


def _shifted(x: Tensor, n_columns: int, offset: int, step: int) -> Tensor:
    """out[..., i, c] = x[..., i, c + step · i + offset], 0 where x has no such column."""
    *lead, n_rows, n_from = x.shape
    out = x.new_empty(*lead, n_rows, n_columns)
    if out.numel() == 0:
        return out
    matrices = x.reshape(math.prod(lead), n_rows, n_from)
    column_blocks = triton.cdiv(n_columns, _BLOCK_C)
    grid = (matrices.shape[0] * triton.cdiv(n_rows, _BLOCK_I) * column_blocks,)
    far = n_rows + n_columns + n_from  # beyond it no column of x is met
    with torch.cuda.device_of(x):
        launch(
            _rel_shift_kernel,
            grid,
            matrices,
            out,
            *matrices.stride(),
            n_rows,
            n_from,
            n_columns,
            min(max(offset, -far), far),
            STEP=step,
            BLOCK_I=_BLOCK_I,
            BLOCK_C=_BLOCK_C,
        )
    return out


@triton.jit(do_not_specialize=["n_rows", "n_from", "n_columns", "offset"])
def _rel_shift_kernel(
    p_x,  # [N, n_rows, n_from], any strides
    p_out,  # [N, n_rows, n_columns], contiguous
    s_x_n,
    s_x_i,
    s_x_c,
    n_rows,
    n_from,
    n_columns,
    offset,
    STEP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_I rows of BLOCK_C columns of one matrix of the result.

    Reads each element of x once and writes each of out once; sums nothing, so it is deterministic.
    """
    column_blocks = tl.cdiv(n_columns, BLOCK_C)
    row_blocks = tl.cdiv(n_rows, BLOCK_I)
    i_block = tl.program_id(0) // column_blocks
    o_c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    o_i = i_block % row_blocks * BLOCK_I + tl.arange(0, BLOCK_I)[:, None]
    i_n = (i_block // row_blocks).to(tl.int64)
    o_from = o_c + STEP * o_i + offset
    inside = (o_i < n_rows) & (o_from >= 0) & (o_from < n_from)
    p_from = p_x + i_n * s_x_n + o_i.to(tl.int64) * s_x_i + o_from.to(tl.int64) * s_x_c
    b_x = tl.load(p_from, mask=inside, other=0.0)
    p_tile = p_out + (i_n * n_rows + o_i) * n_columns + o_c
    tl.store(p_tile, b_x, mask=(o_i < n_rows) & (o_c < n_columns))
