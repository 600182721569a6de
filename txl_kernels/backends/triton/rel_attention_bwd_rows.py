"""Data of each query that both backward kernels of `rel_attention` read, prepared once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.triton.launching import launch
from txl_kernels.backends.triton.rel_attention_call import strides
from txl_kernels.backends.triton.rel_attention_config import block_size
from txl_kernels.backends.triton.rel_attention_tile import (
    biased_queries,
    load_rows,
    padded_rows,
)

_ROWS = 32  # queries of a program


@triton.jit
def _rel_attention_bwd_rows_kernel(
    p_dout,  # [B, H, Tq, DV]
    p_out,  # [B, H, Tq, DV]
    p_lse,  # [B, H, Tq], contiguous, float32
    p_q,  # [B, H, Tq, D]
    p_r_w_bias,  # [H, D], or None
    p_r_r_bias,  # the same
    p_qu,  # [B, H, padded_rows(Tq), BLOCK_D], contiguous: q + r_w_bias
    p_qv,  # the same with r_r_bias, or None without biases, where it equals p_qu
    p_padded_lse,  # [B, H, padded_rows(Tq)], contiguous, float32
    p_delta,  # the same
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
    """One program: prepares BLOCK_Q queries of one (batch, head).

    Writes delta = Σ_d dout · out, in float32; lse, which is infinite for queries without keys and
    for padding, so that their probabilities are 0; and the queries with each head bias, rounded to
    the dtype that the products read, 0 in the padding.
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
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    tl.store(p_padded_lse + o_row, b_lse)
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
    """Launches the kernel above; returns the other kernels' arguments that describe queries."""
    B, H, Tq, D = q.shape
    Dv = out.shape[3]
    n_rows = padded_rows.fn(Tq)
    rows = {name: lse.new_empty(B, H, n_rows) for name in ("p_padded_lse", "p_delta")}
    qu = q.new_empty(B, H, n_rows, block_size(D))
    qv = None if r_w_bias is None and r_r_bias is None else torch.empty_like(qu)
    if lse.numel() > 0:
        with torch.cuda.device_of(out):
            launch(
                _rel_attention_bwd_rows_kernel,
                (n_rows // _ROWS * B * H,),
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
