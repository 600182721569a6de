"""Data of each query that both backward kernels of `rel_attention` read, prepared once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.triton.launching import launch
from txl_kernels.backends.triton.rel_attention_call import strides
from txl_kernels.backends.triton.rel_attention_keys import padded_rows
from txl_kernels.backends.triton.rel_attention_tile import biased_queries, load_rows

_ROWS = 32  # queries of a program
# The arguments that only this kernel reads: the others read p_qu and p_qv instead.
_OF_QUERIES = (
    "p_q",
    "p_q_pos",
    "p_r_w_bias",
    "p_r_r_bias",
    "s_q_b",
    "s_q_h",
    "s_q_i",
    "s_q_pos_b",
    "s_q_pos_h",
    "s_q_pos_i",
    "content_factor",
    "position_factor",
)


@triton.jit(do_not_specialize=["H", "Tq", "content_factor", "position_factor"])
def _rel_attention_bwd_rows_kernel(
    p_dout,  # [B, H, Tq, DV]
    p_dlse,  # [B, H, Tq], contiguous, or None
    p_out,  # [B, H, Tq, DV]
    p_lse,  # [B, H, Tq], contiguous, float32
    p_q,  # [B, H, Tq, D]
    p_q_pos,  # [B, H, Tq, DP], or None
    p_r_w_bias,  # [H, D], or None
    p_r_r_bias,  # [H, DP], or None
    p_qu,  # [B, H, padded_rows(Tq), BLOCK_D], contiguous: (q + r_w_bias) · content_factor
    p_qv,  # [B, H, padded_rows(Tq), BLOCK_DP], of q_pos, or None if it equals p_qu
    p_padded_lse,  # [B, H, padded_rows(Tq)], contiguous, float32
    p_delta,  # the same
    s_dout_b, s_dout_h, s_dout_i,
    s_out_b, s_out_h, s_out_i,
    s_q_b, s_q_h, s_q_i,
    s_q_pos_b, s_q_pos_h, s_q_pos_i,
    H, Tq, content_factor, position_factor,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DP: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: prepares BLOCK_Q queries of one (batch, head).

    Writes delta = Σ_d dout · out − dlse, in float32; lse, which is infinite for queries without
    keys and for padding, so that their probabilities are 0; and the queries with each head bias,
    rounded to the dtype that the products read, 0 in the padding. A query without keys has delta 0,
    because the gradient of its lse may be NaN.
    """
    n_tiles = padded_rows(Tq) // BLOCK_Q
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_i = tl.program_id(0) % n_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d, o_dp, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DP), tl.arange(0, BLOCK_DV)
    p_dout += i_b * s_dout_b + i_h * s_dout_h
    p_out += i_b * s_out_b + i_h * s_out_h
    b_dout = load_rows(p_dout, o_i, s_dout_i, Tq, o_dv, DV).to(tl.float32)
    b_out = load_rows(p_out, o_i, s_out_i, Tq, o_dv, DV).to(tl.float32)
    b_delta = tl.sum(b_dout * b_out, 1)
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + i_bh * Tq + o_i, mask=o_i < Tq, other=0.0)
    b_lse = tl.load(p_lse + i_bh * Tq + o_i, mask=o_i < Tq, other=float("-inf"))
    dead = b_lse == float("-inf")
    o_row = i_bh * padded_rows(Tq) + o_i
    tl.store(p_delta + o_row, tl.where(dead, 0.0, b_delta))
    tl.store(p_padded_lse + o_row, tl.where(dead, float("inf"), b_lse))
    b_q = load_rows(p_q + i_b * s_q_b + i_h * s_q_h, o_i, s_q_i, Tq, o_d, D)
    b_qu = biased_queries(b_q, p_r_w_bias, i_h, o_d, D, content_factor)
    o_tile = o_row[:, None] * BLOCK_D + o_d[None, :]
    tl.store(p_qu + o_tile, tl.where((o_i < Tq)[:, None], b_qu, 0.0))
    if p_qv is not None:
        if p_q_pos is not None:
            p_rows = p_q_pos + i_b * s_q_pos_b + i_h * s_q_pos_h
            b_q = load_rows(p_rows, o_i, s_q_pos_i, Tq, o_dp, DP)
        b_qv = biased_queries(b_q, p_r_r_bias, i_h, o_dp, DP, position_factor)
        o_tile = o_row[:, None] * BLOCK_DP + o_dp[None, :]
        tl.store(p_qv + o_tile, tl.where((o_i < Tq)[:, None], b_qv, 0.0))


def prepared_rows(
    arguments: dict[str, Any],
    dout: Tensor,  # [B, H, Tq, Dv]
    dlse: Tensor | None,  # [B, H, Tq]
    out: Tensor,  # [B, H, Tq, Dv]
    lse: Tensor,  # [B, H, Tq]
) -> dict[str, Any]:
    """Launches the kernel above; returns the arguments of the others.

    `arguments` are the results of `kernel_arguments`.
    """
    queries = {name: arguments[name] for name in _OF_QUERIES}
    others = {name: value for name, value in arguments.items() if name not in queries}
    B, H, Tq, _ = dout.shape
    n_rows = padded_rows.fn(Tq)
    rows = {name: lse.new_empty(B, H, n_rows) for name in ("p_padded_lse", "p_delta")}
    qu = queries["p_q"].new_empty(B, H, n_rows, arguments["BLOCK_D"])
    is_same = queries["content_factor"] == queries["position_factor"] and all(
        queries[name] is None for name in ("p_q_pos", "p_r_w_bias", "p_r_r_bias")
    )
    qv = None if is_same else qu.new_empty(B, H, n_rows, arguments["BLOCK_DP"])
    if lse.numel() > 0:
        with torch.cuda.device_of(out):
            launch(
                _rel_attention_bwd_rows_kernel,
                (n_rows // _ROWS * B * H,),
                p_dout=dout,
                p_dlse=None if dlse is None else dlse.contiguous(),
                p_out=out,
                p_lse=lse.contiguous(),
                p_qu=qu,
                p_qv=qv,
                **rows,
                **strides("dout", dout, "bhi"),
                **strides("out", out, "bhi"),
                **queries,
                **{name: arguments[name] for name in ("H", "Tq", "D", "DP", "DV")},
                **{name: arguments[name] for name in ("BLOCK_D", "BLOCK_DP", "BLOCK_DV")},
                BLOCK_Q=_ROWS,
            )
    found = {"p_qu": qu, "p_qv": qu if qv is None else qv}
    return {**others, **found, "p_dout": dout, **strides("dout", dout, "bhi"), **rows}
