"""What the backward kernels of `rel_attention` need of every query, prepared once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.triton.rel_attention_call import strides
from txl_kernels.backends.triton.rel_attention_config import block_size
from txl_kernels.backends.triton.rel_attention_tile import (
    LOG2_E,
    biased_queries,
    load_rows,
    padded_rows,
)

_ROWS = 32  # of a program


@triton.jit
def _rel_attention_bwd_rows_kernel(
    p_dout,  # [B, H, Tq, DV]
    p_out,  # [B, H, Tq, DV]
    p_lse,  # [B, H, Tq], contiguous, float32
    p_q,  # [B, H, Tq, D]
    p_r_w_bias,  # [H, D], or None
    p_r_r_bias,  # the same
    p_qu,  # [B, H, padded_rows(Tq), BLOCK_D], contiguous: q + r_w_bias
    p_qv,  # the same, of r_r_bias, or None where that is no other
    p_lse_high,  # [B, H, padded_rows(Tq)], contiguous, float32, as the two below
    p_lse_low,  # or None
    p_delta,
    s_dout_b, s_dout_h, s_dout_i,
    s_out_b, s_out_h, s_out_i,
    s_q_b, s_q_h, s_q_i,
    H, Tq,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: what backward needs of BLOCK_Q queries of one (batch, head), once.

    delta = Σ_d dout · out, in float32; lse in base 2 as high + low, for rounded to one float32 it
    would err as much as all else in a float32 probability. A query without keys, and what pads the
    queries, gets high = ∞. The queries with each head bias, rounded as the products take them, and
    0 where there is none.
    """
    n_tiles = padded_rows(Tq) // BLOCK_Q
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_i = tl.program_id(0) % n_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_dout += i_b * s_dout_b + i_h * s_dout_h
    p_out += i_b * s_out_b + i_h * s_out_h
    b_dout = load_rows(p_dout, o_i, s_dout_i, Tq, o_dv, DV).to(tl.float32)
    b_out = load_rows(p_out, o_i, s_out_i, Tq, o_dv, DV).to(tl.float32)
    o_row = i_bh * padded_rows(Tq) + o_i
    tl.store(p_delta + o_row, tl.sum(b_dout * b_out, 1))
    b_lse = tl.load(p_lse + i_bh * Tq + o_i, mask=o_i < Tq, other=float("-inf"))
    dead = b_lse == float("-inf")
    b_lse = tl.where(dead, 0.0, b_lse).to(tl.float64) * LOG2_E
    b_high = b_lse.to(tl.float32)
    tl.store(p_lse_high + o_row, tl.where(dead, float("inf"), b_high))
    if p_lse_low is not None:
        tl.store(p_lse_low + o_row, (b_lse - b_high.to(tl.float64)).to(tl.float32))
    b_q = load_rows(p_q + i_b * s_q_b + i_h * s_q_h, o_i, s_q_i, Tq, o_d, D)
    o_tile = o_row[:, None] * BLOCK_D + o_d[None, :]
    b_qu = biased_queries(b_q, p_r_w_bias, i_h, o_d, D, 1.0)
    tl.store(p_qu + o_tile, tl.where((o_i < Tq)[:, None], b_qu, 0.0))
    if p_qv is not None:
        b_qv = biased_queries(b_q, p_r_r_bias, i_h, o_d, D, 1.0)
        tl.store(p_qv + o_tile, tl.where((o_i < Tq)[:, None], b_qv, 0.0))


def prepared_rows(
    dout: Tensor,  # [B, H, Tq, Dv]
    q: Tensor,  # [B, H, Tq, D]
    r_w_bias: Tensor | None,  # [H, D], contiguous
    r_r_bias: Tensor | None,  # [H, D], contiguous
    out: Tensor,  # [B, H, Tq, Dv]
    lse: Tensor,  # [B, H, Tq]
) -> dict[str, Any]:
    """The arguments of the other backward kernels that are about queries.

    lse's low part is there in float32 alone: probabilities of 16 bits are coarser by far.
    """
    B, H, Tq, D = q.shape
    Dv = out.shape[3]
    low = q.dtype == torch.float32
    n_rows = padded_rows.fn(Tq)
    rows = {
        name: lse.new_empty(B, H, n_rows) if wanted else None
        for name, wanted in (("p_lse_high", True), ("p_lse_low", low), ("p_delta", True))
    }
    qu = q.new_empty(B, H, n_rows, block_size(D))
    qv = None if r_w_bias is None and r_r_bias is None else torch.empty_like(qu)
    if lse.numel() > 0:
        with torch.cuda.device_of(out):
            _rel_attention_bwd_rows_kernel[(n_rows // _ROWS * B * H,)](
                p_dout=dout,
                p_out=out,
                p_lse=lse.contiguous(),
                p_q=q,
                p_r_w_bias=r_w_bias,
                p_r_r_bias=r_r_bias,
                p_qu=qu,
                p_qv=qv,
                **rows,
                **strides("dout", dout, "bhi"),
                **strides("out", out, "bhi"),
                **strides("q", q, "bhi"),
                H=H,
                Tq=Tq,
                D=D,
                DV=Dv,
                BLOCK_Q=_ROWS,
                BLOCK_D=block_size(D),
                BLOCK_DV=block_size(Dv),
            )
    found = {"p_qu": qu, "p_qv": qu if qv is None else qv}
    return {**found, "p_dout": dout, **strides("dout", dout, "bhi"), **rows}
