"""Inkling's content-dependent relative-position bias: each token draws its own bias over distances
from a few profiles that all heads share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformer_xl.nn.streaming import split_heads
from txl_kernels.ops.checks import check_int, check_shape


class RelativeBias(nn.Module):
    """bias_ij = (r_proj x_i)·proj[:, i - j] for 0 <= i - j < extent, else 0.

    The result has the form of `rel_attention`'s arguments `q_pos` and `r`, so that the bias is
    computed inside the kernel and no [T, T] or [T, extent] matrix per head is in memory.

    Args:
        d_model, n_head: sizes of the attention that uses the bias.
        d_rel: number of profiles, the width of the position query.
        extent: number of distances that have a bias, in tokens.

    The parameters are those of Hugging Face's InklingAttention: `r_proj.weight` has the same name
    there, `proj` [d_rel, extent] is its `rel_logits_proj.proj`. Like there, `proj` is initially
    normal with a standard deviation of 0.02.
    """

    def __init__(self, d_model: int, n_head: int, d_rel: int, extent: int) -> None:
        super().__init__()
        op = type(self).__name__
        self.d_model = check_int(op, "d_model", d_model, at_least=1)
        self.n_head = check_int(op, "n_head", n_head, at_least=1)
        self.d_rel = check_int(op, "d_rel", d_rel, at_least=1)
        self.extent = check_int(op, "extent", extent, at_least=1)
        self.r_proj = nn.Linear(self.d_model, self.n_head * self.d_rel, bias=False)
        self.proj = nn.Parameter(torch.empty(self.d_rel, self.extent))
        nn.init.normal_(self.proj, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The position query and the position table of a block x [B, T, d_model].

        Returns:
            q_pos [B, n_head, T, d_rel], and r [1, 1, extent, d_rel] in q_pos' dtype, whose row m
            belongs to distance extent - 1 - m. Arguments of `rel_attention` that belong to them:
            offset = extent - 1 - (Tk - Tq), clamp False, causal True, pos_scale 1 for a bias.
        """
        check_shape(type(self).__name__, "x", x, ("B", "T", self.d_model))
        (q_pos,) = split_heads(self.r_proj(x), (self.n_head,))
        r = self.proj.t().flip(0)[None, None].to(q_pos.dtype)
        return q_pos, r
