"""The kernels of `torch.ops.txl_triton.rel_attention_bwd`: allocates and launches three kernels.

It does not check its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from txl_kernels._rel_attention_call import N_DIFFERENTIABLE, RelAttentionCall
from txl_kernels.backends.triton.launching import launch
from txl_kernels.backends.triton.rel_attention_bwd_dkdv import _rel_attention_bwd_dkdv_kernel
from txl_kernels.backends.triton.rel_attention_bwd_dqdr import _rel_attention_bwd_dqdr_kernel
from txl_kernels.backends.triton.rel_attention_bwd_rows import prepared_rows
from txl_kernels.backends.triton.rel_attention_call import kernel_arguments, near_rows, strides
from txl_kernels.backends.triton.rel_attention_config import (
    block_size,
    dkdv_config,
    dqdr_config,
)

# Deterministic dr: enough programs for two on each multiprocessor, if their copies of dr fit in
# this many bytes.
_SPLIT_PROGRAMS = 264
_SPLIT_BYTES = 2**28


def rel_attention_bwd(
    dout: Tensor,  # [B, H, Tq, Dv]
    dlse: Tensor,  # [B, H, Tq], or of size 0
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, Hk, Ts, D]
    v: Tensor,  # [B, Hk, Ts, Dv]
    r: Tensor,  # [1 or B, 1 or H, R, Dp]
    optional: Sequence[Tensor],
    rules: Sequence[int],
    numbers: Sequence[float],
    out: Tensor,  # [B, H, Tq, Dv]
    lse: Tensor,  # [B, H, Tq]
    needs_grad: Sequence[bool],
) -> list[Tensor]:
    """Returns dq, dk, dv, dr, dr_w_bias, dr_r_bias, dmem_k, dmem_v and dq_pos.

    A gradient that `needs_grad` does not request is an empty tensor too, and no kernel computes
    it. Programs add to dr atomically. Under `torch.are_deterministic_algorithms_enabled()` each
    program of a launch has its own copy of dr instead; several launches use the same copies, which
    are summed in a fixed order.
    """
    call = RelAttentionCall.of_arguments(q, k, v, r, optional, rules, numbers)
    arguments = kernel_arguments(call)
    inputs = (*call[:4], *call.optional[: N_DIFFERENTIABLE - 4])
    dout = near_rows(dout)
    requested = [x if needed else None for x, needed in zip(inputs, needs_grad, strict=True)]
    dq, dk, dv, _, _, _, dmem_k, dmem_v, _ = (
        None if x is None else x.new_empty(x.shape) for x in requested
    )
    r_w_bias, r_r_bias = arguments.pop("p_r_w_bias"), arguments.pop("p_r_r_bias")
    q = arguments.pop("p_q")
    for name in strides("q", q, "bhi"):
        arguments.pop(name)
    arguments |= prepared_rows(dout, q, r_w_bias, r_r_bias, out, lse)
    arguments["scale"] *= arguments.pop("sign")
    arguments |= {"BLOCK_D": block_size(q.shape[3]), "BLOCK_DV": block_size(v.shape[3])}
    _launch_dkdv(arguments, q, dk, dv, dmem_k, dmem_v)
    dr, dr_w_bias, dr_r_bias = _launch_dqdr(arguments, q, dq, *requested[3:6])
    grads = (dq, dk, dv, dr, dr_w_bias, dr_r_bias, dmem_k, dmem_v, None)
    return [dout.new_empty(0) if grad is None else grad for grad in grads]


def _launch_dkdv(
    arguments: dict[str, Any],
    q: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
    dmem_k: Tensor | None,
    dmem_v: Tensor | None,
) -> None:
    """Writes the gradients that are not None; skips tiles of keys without a requested gradient."""
    B, H, _, D = q.shape
    Tm, Tk = arguments["Tm"], arguments["Tk"]
    config = dkdv_config(q.device, D, arguments["DV"], q.dtype)
    memory_tiles = triton.cdiv(Tm, config.BLOCK_K)  # a tile is of the memory or of the segment
    needs_memory = dmem_k is not None or dmem_v is not None
    first_tile = 0 if needs_memory else memory_tiles
    n_tiles = memory_tiles - first_tile
    if dk is not None or dv is not None:
        n_tiles += triton.cdiv(Tk - Tm, config.BLOCK_K)
    if n_tiles * B * H == 0:
        return
    with torch.cuda.device_of(q):
        launch(
            _rel_attention_bwd_dkdv_kernel,
            (n_tiles * B * H,),
            **arguments,
            p_dk=dk,
            p_dv=dv,
            p_dmem_k=dmem_k,
            p_dmem_v=dmem_v,
            first_tile=first_tile,
            n_tiles=n_tiles,
            **config.options(),
            enable_fp_fusion=False,  # see `exponents`
        )


def _launch_dqdr(
    arguments: dict[str, Any],
    q: Tensor,
    dq: Tensor | None,
    r: Tensor | None,
    r_w_bias: Tensor | None,
    r_r_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Fills dq; returns the gradients of those of r, r_w_bias, r_r_bias that are not None."""
    if dq is None and r is None and r_w_bias is None and r_r_bias is None:
        return None, None, None
    B, H, Tq, D = q.shape
    has_mask, has_dropout = (arguments[name] is not None for name in ("p_mask", "p_seed"))
    config = dqdr_config(q.device, D, arguments["DV"], q.dtype, has_mask, has_dropout)
    n_tiles = triton.cdiv(Tq, config.BLOCK_Q)
    # Items are the tiles that add to the same rows of dr: of all batch rows if these share r.
    rows = B if arguments["p_r"].shape[0] == 1 else 1
    n_items = n_splits = rows * n_tiles
    copies = None
    if r is not None and torch.are_deterministic_algorithms_enabled():
        n_splits = _split_count(n_items, B // max(rows, 1) * H, 4 * r.shape[2] * D)
        copies = r.new_zeros(r.shape[0], H, n_splits, *r.shape[2:], dtype=torch.float32)
    elif r is not None:
        copies = r.new_zeros(*r.shape[:2], 1, *r.shape[2:], dtype=torch.float32)
    dqu_sums, dqv_sums = (
        None if x is None else q.new_empty(B, H, n_tiles, D, dtype=torch.float32)
        for x in (r_w_bias, r_r_bias)
    )
    if n_items * B * H > 0:
        with torch.cuda.device_of(q):
            for first_item in range(0, n_items, n_splits):
                n_programs = min(n_splits, n_items - first_item)
                launch(
                    _rel_attention_bwd_dqdr_kernel,
                    (n_programs * H * (B // rows),),
                    **arguments,
                    p_dq=dq,
                    p_dr=copies,
                    p_dqu_sums=dqu_sums,
                    p_dqv_sums=dqv_sums,
                    **strides("dr", copies, "bhs"),
                    first_item=first_item,
                    n_splits=n_programs,
                    **config.options(),
                    enable_fp_fusion=False,  # see `exponents`
                )
    dr = None
    if r is not None and copies is not None:
        dr = copies.sum(2) if r.shape[1] == copies.shape[1] else copies.sum((1, 2))[:, None]
        dr = dr.mul_(arguments["scale"]).to(r.dtype)
    return (
        dr,
        None if r_w_bias is None or dqu_sums is None else dqu_sums.sum((0, 2)).to(r_w_bias.dtype),
        None if r_r_bias is None or dqv_sums is None else dqv_sums.sum((0, 2)).to(r_r_bias.dtype),
    )


def _split_count(n_items: int, n_groups: int, copy_bytes: int) -> int:
    """The number of copies of dr for each group of programs."""
    affordable = _SPLIT_BYTES // max(1, n_groups * copy_bytes)
    return max(1, min(n_items, -(-_SPLIT_PROGRAMS // max(1, n_groups)), affordable))
