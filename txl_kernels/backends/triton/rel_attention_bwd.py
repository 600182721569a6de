"""The kernels of `torch.ops.txl_triton.rel_attention_bwd`: allocates and launches three kernels.

It does not check its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from txl_kernels._rel_attention_call import N_DIFFERENTIABLE, RelAttentionCall, is_absent
from txl_kernels.backends.triton.launching import launch
from txl_kernels.backends.triton.rel_attention_bwd_dkdv import _rel_attention_bwd_dkdv_kernel
from txl_kernels.backends.triton.rel_attention_bwd_dqdr import _rel_attention_bwd_dqdr_kernel
from txl_kernels.backends.triton.rel_attention_bwd_rows import prepared_rows
from txl_kernels.backends.triton.rel_attention_call import kernel_arguments, near_rows, strides
from txl_kernels.backends.triton.rel_attention_config import dkdv_config, dqdr_config

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

    A gradient that `needs_grad` does not request is an empty tensor, and no kernel computes it.
    Programs add to dr atomically. Under `torch.are_deterministic_algorithms_enabled()` each program
    of a launch has its own copy of dr instead; several launches use the same copies, which are
    summed in a fixed order.
    """
    call = RelAttentionCall.of_arguments(q, k, v, r, optional, rules, numbers)
    inputs = (*call[:4], *call.optional)[:N_DIFFERENTIABLE]
    requested = [x if needed else None for x, needed in zip(inputs, needs_grad, strict=True)]
    dq, dk, dv, _, _, _, dmem_k, dmem_v, dq_pos = (
        None if x is None else x.new_empty(x.shape) for x in requested
    )
    arguments = kernel_arguments(call)
    dqu_scale = arguments["scale"] * arguments["content_factor"]
    dqv_scale = arguments["scale"] * arguments["position_factor"]
    given_dlse = None if is_absent(dlse) else dlse
    arguments = prepared_rows(arguments, near_rows(dout), given_dlse, out, lse)
    _launch_dkdv(arguments, dk, dv, dmem_k, dmem_v)
    arguments |= {"dqu_scale": dqu_scale, "dqv_scale": dqv_scale}
    arguments["HAS_Q_POS"] = call.optional.q_pos is not None
    dr, dr_w_bias, dr_r_bias = _launch_dqdr(arguments, dq, dq_pos, *requested[3:6])
    grads = (dq, dk, dv, dr, dr_w_bias, dr_r_bias, dmem_k, dmem_v, dq_pos)
    return [dout.new_empty(0) if grad is None else grad for grad in grads]


def _launch_dkdv(
    arguments: dict[str, Any],
    dk: Tensor | None,
    dv: Tensor | None,
    dmem_k: Tensor | None,
    dmem_v: Tensor | None,
) -> None:
    """Writes the gradients that are not None; skips tiles of keys without a requested gradient."""
    k = arguments["p_k"]
    B, Hk = k.shape[:2]
    Tm, Tk = arguments["Tm"], arguments["Tk"]
    has_mask, has_dropout = (arguments[name] is not None for name in ("p_mask", "p_seed"))
    config = dkdv_config(k.device, _head_sizes(arguments), k.dtype, has_mask, has_dropout)
    memory_tiles = triton.cdiv(Tm, config.BLOCK_K)  # a tile is of the memory or of the segment
    needs_memory = dmem_k is not None or dmem_v is not None
    first_tile = 0 if needs_memory else memory_tiles
    n_tiles = memory_tiles - first_tile
    if dk is not None or dv is not None:
        n_tiles += triton.cdiv(Tk - Tm, config.BLOCK_K)
    if n_tiles * B * Hk == 0:
        return
    with torch.cuda.device_of(k):
        launch(
            _rel_attention_bwd_dkdv_kernel,
            (n_tiles * B * Hk,),
            **arguments,
            p_dk=dk,
            p_dv=dv,
            p_dmem_k=dmem_k,
            p_dmem_v=dmem_v,
            first_tile=first_tile,
            n_tiles=n_tiles,
            NUM_STAGES=config.num_stages,
            **config.options(),
            enable_fp_fusion=False,  # see `exponents`
        )


def _launch_dqdr(
    arguments: dict[str, Any],
    dq: Tensor | None,
    dq_pos: Tensor | None,
    r: Tensor | None,
    r_w_bias: Tensor | None,
    r_r_bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Fills dq and dq_pos; returns the gradients of r, r_w_bias, r_r_bias if these are not None."""
    if all(x is None for x in (dq, dq_pos, r, r_w_bias, r_r_bias)):
        return None, None, None
    qu = arguments["p_qu"]
    B, H, Tq = qu.shape[0], arguments["H"], arguments["Tq"]
    has_mask, has_dropout = (arguments[name] is not None for name in ("p_mask", "p_seed"))
    config = dqdr_config(qu.device, _head_sizes(arguments), qu.dtype, has_mask, has_dropout)
    n_tiles = triton.cdiv(Tq, config.BLOCK_Q)
    # Items are the tiles that add to the same rows of dr: of all batch rows if these share r.
    rows = B if arguments["p_r"].shape[0] == 1 else 1
    n_items = n_splits = rows * n_tiles
    copies = None
    if r is not None and torch.are_deterministic_algorithms_enabled():
        n_splits = _split_count(n_items, B // max(rows, 1) * H, 4 * r.shape[2] * r.shape[3])
        copies = r.new_zeros(r.shape[0], H, n_splits, *r.shape[2:], dtype=torch.float32)
    elif r is not None:
        copies = r.new_zeros(*r.shape[:2], 1, *r.shape[2:], dtype=torch.float32)
    dqu_sums, dqv_sums = (
        None if x is None else qu.new_empty(B, H, n_tiles, x.shape[1], dtype=torch.float32)
        for x in (r_w_bias, r_r_bias)
    )
    if n_items * B * H > 0:
        with torch.cuda.device_of(qu):
            for first_item in range(0, n_items, n_splits):
                n_programs = min(n_splits, n_items - first_item)
                launch(
                    _rel_attention_bwd_dqdr_kernel,
                    (n_programs * H * (B // rows),),
                    **arguments,
                    p_dq=dq,
                    p_dq_pos=dq_pos,
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


def _head_sizes(arguments: dict[str, Any]) -> tuple[int, int, int]:
    return arguments["D"], arguments["DV"], arguments["DP"]


def _split_count(n_items: int, n_groups: int, copy_bytes: int) -> int:
    """The number of copies of dr for each group of programs."""
    affordable = _SPLIT_BYTES // max(1, n_groups * copy_bytes)
    return max(1, min(n_items, -(-_SPLIT_PROGRAMS // max(1, n_groups)), affordable))
