"""The kernel of `torch.ops.txl_triton.rel_attention_fwd`: allocates the outputs and launches.

It does not check its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from txl_kernels.backends.triton.launching import launch
from txl_kernels.backends.triton.rel_attention_call import kernel_arguments
from txl_kernels.backends.triton.rel_attention_config import (
    block_size,
    forward_config,
)
from txl_kernels.backends.triton.rel_attention_fwd import _rel_attention_fwd_kernel


def rel_attention_fwd(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, H, Ts, D]
    v: Tensor,  # [B, H, Ts, Dv]
    r: Tensor,  # [1 or B, 1 or H, R, D]
    r_w_bias: Tensor | None,  # [H, D]
    r_r_bias: Tensor | None,  # [H, D]
    mem_k: Tensor | None,  # [B, H, Tm, D]
    mem_v: Tensor | None,  # [B, H, Tm, Dv]
    q_pos: Tensor | None,
    key_start: Tensor | None,  # [B]
    key_lens: Tensor | None,  # [B]
    mask: Tensor | None,  # [B, H, Tq, Tk]
    bias: Tensor | None,
    dropout_seed: Tensor | None,  # one element
    offset: int,
    clamp: bool,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    chunk: Sequence[int],
    scale: float,
    softcap: float,
    dropout_p: float,
    dead_uniform: bool,
) -> tuple[Tensor, Tensor]:
    """Returns out [B, H, Tq, Dv] in q's dtype and lse [B, H, Tq] in float32."""
    assert q_pos is None, "`resolve` refuses calls with this argument and the two below"
    assert bias is None
    assert not dead_uniform
    arguments = kernel_arguments(
        q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, key_start, key_lens, mask, dropout_seed,
        offset, clamp, causal, window_left, window_right, chunk, scale, softcap, dropout_p,
    )  # fmt: skip
    B, H, Tq, D = q.shape
    Dv = v.shape[3]
    out = q.new_empty(B, H, Tq, Dv)
    lse = q.new_empty(B, H, Tq, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    config = forward_config(q.device, D, Dv, q.dtype, Tq, mask is not None, dropout_p > 0)
    grid = (triton.cdiv(Tq, config.BLOCK_Q) * B * H,)
    with torch.cuda.device_of(q):
        launch(
            _rel_attention_fwd_kernel,
            grid,
            **arguments,
            p_out=out,
            p_lse=lse,
            BLOCK_D=block_size(D),
            BLOCK_DV=block_size(Dv),
            **config.options(),
        )
    return out, lse
