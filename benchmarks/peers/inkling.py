"""Attention of the Inkling models as Hugging Face computes it: the position bias is materialised.

score_ij = scale · q_i·k_j + rel_i · proj[:, d], where d is the distance from query i back to key j;
the bias is 0 where d is outside [0, R). `materialised` restates the path of transformers 5.24.0 for
`attn_implementation="sdpa"`, `with_sink` the one of Inkling 2, and `hugging_face` calls the former.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import PeerUnavailableError
from benchmarks.peers.eager import per_query_head
from benchmarks.peers.hugging_face import VERSION


def position_bias(
    rel: Tensor,  # [B, H, Tq, d_rel]
    proj: Tensor,  # [d_rel, R]
    distance: Tensor,  # int64 [Tq, Tk]
) -> Tensor:
    """[B, H, Tq, Tk]: each query's product with the column of `proj` for each key's distance."""
    R = proj.shape[1]
    columns = distance.clamp(0, R - 1).expand(*rel.shape[:2], -1, -1)
    bias = (rel @ proj).gather(-1, columns)
    return bias.masked_fill((distance < 0) | (distance >= R), 0.0)


def materialised(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, Hk, Tk, D]
    v: Tensor,  # [B, Hk, Tk, Dv]
    rel: Tensor,  # [B, H, Tq, d_rel]
    proj: Tensor,  # [d_rel, R]
    *,
    distance: Tensor,  # int64 [Tq, Tk]
    attends: Tensor,  # bool, broadcastable to [B, H, Tq, Tk]
    scale: float,
    tau: Tensor | None = None,  # [Tq, 1]
) -> Tensor:
    """[B, H, Tq, Dv]. `tau` multiplies the queries and the bias."""
    bias = position_bias(rel, proj, distance)
    if tau is not None:
        q, bias = q * tau, bias * tau
    mask = torch.where(attends, bias, torch.finfo(bias.dtype).min).contiguous()
    k, v = (per_query_head(x, q.shape[1]) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def with_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor,
    proj: Tensor,
    *,
    sink: Tensor,  # [B, H, Tq]
    distance: Tensor,
    attends: Tensor,
    scale: float,
    tau: Tensor | None = None,
) -> Tensor:
    """[B, H, Tq, Dv]: the softmax has one more logit, the sink, whose value is 0.

    `tau` multiplies the queries and `rel` before its product with `proj`.
    """
    if tau is not None:
        q, rel = q * tau, rel * tau
    k, v = (per_query_head(x, q.shape[1]) for x in (k, v))
    scores = q @ k.mT * scale + position_bias(rel, proj, distance)
    scores = scores.masked_fill(~attends, -torch.inf)
    return torch.cat([scores, sink[..., None]], dim=-1).softmax(-1)[..., :-1] @ v


def hugging_face(
    d_rel: int, extent: int, n_key_head: int, attends: Tensor | None
) -> Callable[..., Tensor]:
    """Hugging Face's own classes, as a function of q, k, v, rel, proj and scale.

    Args:
        attends: bool [1, 1, Tq, Tk], which the model computes once for all layers of a kind; None
            for causal attention to all keys.

    Raises:
        PeerUnavailableError: this environment has no transformers with these models.
    """
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.models.inkling.modeling_inkling import InklingRelativeLogits
    except ImportError:
        raise PeerUnavailableError(
            f"this environment has no transformers {VERSION}: pip install transformers=={VERSION}"
        ) from None
    logits = InklingRelativeLogits(d_rel, extent)

    def attend(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, proj: Tensor, scale: float) -> Tensor:
        positions = torch.arange(q.shape[2])
        arguments = (rel.transpose(1, 2), positions, positions)
        bias = torch.func.functional_call(logits, {"proj": proj}, arguments)
        module = torch.nn.Module()
        module.num_key_value_groups = q.shape[1] // n_key_head  # type: ignore[assignment]
        out, _ = sdpa_attention_forward(
            module, q, k, v, attends, scaling=scale, position_bias=bias, is_causal=True
        )
        return out.transpose(1, 2)

    return attend
