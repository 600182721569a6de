"""One Transformer-XL layer: relative attention over [memory; segment], then the feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from transformer_xl.memory import document_key_start
from transformer_xl.nn.attention import RelativeMultiHeadAttention
from transformer_xl.nn.dropout import Dropout
from transformer_xl.nn.feed_forward import PositionwiseFeedForward
from transformer_xl.nn.layer_window import LayerWindow
from transformer_xl.nn.position import RelativePositions
from txl_kernels.ops.checks import check_int, check_number


class DecoderLayer(nn.Module):
    """x = LN(x + drop(attention(x, layer_memory))); x = LN(x + feed_forward(x)).

    Args:
        d_model, n_head, d_head, d_inner: sizes.
        dropout: after the attention, and twice inside the feed-forward.
        dropatt: on the attention probabilities.
        pre_lnorm: x + drop(attention(LN(x), LN(layer_memory))); x + feed_forward(LN(x)) instead,
            the memory being stored un-normalised.
        layer_norm_epsilon: of both norms.
        untie_r: the layer has its own position biases, else they are passed in.
        backend: which `rel_attention` must run.

    Source: Dai et al. 2019, section 3.3.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_head: int,
        d_inner: int,
        *,
        dropout: float = 0.0,
        dropatt: float = 0.0,
        pre_lnorm: bool = False,
        layer_norm_epsilon: float = 1e-5,
        untie_r: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        d_model = check_int(op, "d_model", d_model, at_least=1)
        layer_norm_epsilon = check_number(op, "layer_norm_epsilon", layer_norm_epsilon, at_least=0)
        self.pre_lnorm = pre_lnorm
        self.dec_attn = RelativeMultiHeadAttention(
            d_model, n_head, d_head, dropatt=dropatt, untie_r=untie_r, backend=backend
        )
        self.drop = Dropout(dropout)
        self.attn_layer_norm = nn.LayerNorm(d_model, eps=layer_norm_epsilon)
        self.pos_ff = PositionwiseFeedForward(d_model, d_inner, dropout)
        self.ff_layer_norm = nn.LayerNorm(d_model, eps=layer_norm_epsilon)

    def project_kv(self, layer_memory: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values [B, n_head, M, d_head] of stored hidden states [B, M, d_model]."""
        normed = self.attn_layer_norm(layer_memory) if self.pre_lnorm else layer_memory
        return self.dec_attn.project_kv(normed)

    def forward(
        self,
        x: Tensor,
        layer_memory: Tensor | LayerWindow | None = None,
        positions: RelativePositions | None = None,
        r_w_bias: Tensor | None = None,
        r_r_bias: Tensor | None = None,
        key_start: Tensor | None = None,
        document_start: Tensor | None = None,
    ) -> Tensor:
        """[B, T, d_model] to the same; arguments as `RelativeMultiHeadAttention` has them.

        `document_start`, bool [B, T], is True at the first token of a document: no token attends
        before the last True at or before it, neither in `x` nor in `layer_memory`. A `LayerWindow`
        has its own `positions` and ranges of keys; these arguments then have no effect.
        """
        if document_start is not None:
            n_memory = layer_memory.shape[1] if isinstance(layer_memory, Tensor) else 0
            key_start = document_key_start(document_start, x.shape[:2], n_memory, key_start)

        def attention(x: Tensor, layer_memory: Tensor | LayerWindow | None) -> Tensor:
            attended = self.dec_attn(
                x,
                layer_memory,
                positions=positions,
                r_w_bias=r_w_bias,
                r_r_bias=r_r_bias,
                key_start=key_start,
            )
            dropped: Tensor = self.drop(attended)
            return dropped

        attn_norm, ff_norm = self.attn_layer_norm, self.ff_layer_norm
        if self.pre_lnorm:
            if isinstance(layer_memory, Tensor):  # a window has keys of normalised states
                layer_memory = attn_norm(layer_memory)
            x = x + attention(attn_norm(x), layer_memory)
            out: Tensor = x + self.pos_ff(ff_norm(x))
        else:
            x = attn_norm(x + attention(x, layer_memory))
            out = ff_norm(x + self.pos_ff(x))
        return out
