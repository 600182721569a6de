"""The kernel of `torch.ops.txl_triton.rel_attention_fwd`: allocates the outputs and launches.

It does not check its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from txl_kernels._rel_attention_call import RelAttentionCall
from txl_kernels.backends.triton.launching import launch
from txl_kernels.backends.triton.rel_attention_call import kernel_arguments
from txl_kernels.backends.triton.rel_attention_config import forward_config
from txl_kernels.backends.triton.rel_attention_fwd import _rel_attention_fwd_kernel


def rel_attention_fwd(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, Hk, Ts, D]
    v: Tensor,  # [B, Hk, Ts, Dv]
    r: Tensor,  # [1 or B, 1 or H, R, Dp]
    optional: Sequence[Tensor],
    rules: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Returns out [B, H, Tq, Dv] in q's dtype and lse [B, H, Tq] in float32."""
    call = RelAttentionCall.of_arguments(q, k, v, r, optional, rules, numbers)
    arguments = kernel_arguments(call)
    B, H, Tq, D = q.shape
    Dv, Dp = v.shape[3], r.shape[3]
    out = q.new_empty(B, H, Tq, Dv)
    lse = q.new_empty(B, H, Tq, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    has_mask, has_dropout = call.optional.mask is not None, call.numbers.dropout_p > 0
    config = forward_config(q.device, (D, Dv, Dp), q.dtype, Tq, has_mask, has_dropout)
    grid = (triton.cdiv(Tq, config.BLOCK_Q) * B * H,)
    with torch.cuda.device_of(q):
        launch(
            _rel_attention_fwd_kernel,
            grid,
            **arguments,
            p_out=out,
            p_lse=lse,
            **config.options(),
        )
    return out, lse
