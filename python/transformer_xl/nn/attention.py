"""Multi-head attention with Transformer-XL relative positions over [memory; segment]: the
parameters and projections around `txl_kernels.rel_attention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_xl.nn.layer_weights import is_plain
from transformer_xl.nn.layer_window import LayerWindow
from transformer_xl.nn.linear import linear
from transformer_xl.nn.position import RelativePositions, SinusoidalPositions, Window
from transformer_xl.nn.streaming import (
    Options,
    Projected,
    StreamingAttention,
    check_heads,
    split_heads,
)
from txl_kernels import rel_attention
from txl_kernels.ops.autocast import outside_autocast
from txl_kernels.ops.checks import check_number


class RelativeMultiHeadAttention(StreamingAttention):
    """softmax((q + r_w_bias)·k + (q + r_r_bias)·r, scaled by 1/√d_head) v, projected back.

    Queries come from the segment only; memory and segment are projected without being
    concatenated, and the kernel reads both tensors.

    The projections `qkv_net`, `r_net` and `o_net` may carry hooks and may be replaced by wrappers
    (LoRA) or quantised layers. A plain `qkv_net` computes only keys and values of the memory; any
    other is called on the whole memory, and the queries in its result are not used.

    Args:
        d_model, n_head, d_head: sizes; n_head · d_head need not be d_model.
        n_kv_head: heads of keys and values, a divisor of n_head; each serves n_head / n_kv_head
            adjacent query heads. Default n_head.
        causal: True: a token attends to itself and to earlier tokens; False: to all tokens.
        window: (left, right), the most tokens to the left and right of a query that it attends to;
            None in place of a number is no limit.
        clamp_len: distances beyond it (in tokens) share one embedding; 0 or less: no clamp.
        dropatt: dropout on the attention probabilities, in training.
        untie_r: True: the module has its own `r_w_bias`, `r_r_bias` (initially zeros); False: the
            caller passes them.
        backend: "auto", or the only implementation of `rel_attention` that may run.

    Source: Dai et al. 2019, section 3.3; `n_kv_head`: Ainslie et al. 2023.
    """

    r_w_bias: nn.Parameter | None
    r_r_bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_head: int,
        *,
        n_kv_head: int | None = None,
        causal: bool = True,
        window: Window | None = None,
        clamp_len: int = -1,
        dropatt: float = 0.0,
        untie_r: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.n_head, self.n_kv_head, self.d_head = check_heads(op, n_head, n_kv_head, d_head)
        self.dropatt = check_number(op, "dropatt", dropatt, at_least=0)
        self.backend = backend
        self.pos_emb = SinusoidalPositions(
            d_model, causal=causal, window=window, clamp_len=clamp_len
        )
        self.d_model = self.pos_emb.d_model
        width = self.n_head * self.d_head
        rows = width + 2 * self.n_kv_head * self.d_head  # queries, keys, values
        self.qkv_net = nn.Linear(d_model, rows, bias=False)
        self.r_net = nn.Linear(d_model, width, bias=False)
        self.o_net = nn.Linear(width, d_model, bias=False)
        for name in ("r_w_bias", "r_r_bias"):
            bias = nn.Parameter(torch.zeros(self.n_head, self.d_head)) if untie_r else None
            self.register_parameter(name, bias)

    def forward(
        self,
        x: Tensor,
        layer_memory: Tensor | LayerWindow | None = None,
        *,
        positions: RelativePositions | None = None,
        r_w_bias: Tensor | None = None,
        r_r_bias: Tensor | None = None,
        q_start: Tensor | None = None,
        key_start: Tensor | None = None,
        key_lens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each token of `x` to `[layer_memory; x]`.

        Args:
            x: [B, T, d_model].
            layer_memory: [B, M, d_model], hidden states of the M tokens before `x`; or a
                `LayerWindow` of their keys and values, into which those of `x` are written; or
                None. A window has its own positions and ranges of keys, so that `positions` and
                the arguments from `q_start` on have no effect.
            positions: of T queries among M + T keys, embedding [R, d_model]; None: computed from
                this module's own `causal`, `window` and `clamp_len`.
            r_w_bias, r_r_bias: [n_head, d_head], where the module has none of its own.
            q_start: int32 or int64 [B], the position in [layer_memory; x] of each row's first
                query; default M. The position table has rows for distances below M + T tokens.
            key_start, key_lens: int32 or int64 [B] or [B, T], positions in [layer_memory; x]: row
                b (query i) attends to keys key_start <= j < key_lens.
            mask: bool, broadcastable to [B, n_head, T, M + T], True = attend.

        Returns:
            [B, T, d_model].

        Raises:
            ValueError: `x` or `layer_memory` of another shape.
        """
        self._check("x", x, batch=None)
        biases = (r_w_bias, r_r_bias)
        if isinstance(layer_memory, LayerWindow):
            return self._attend_window(x, layer_memory, *biases)
        options: Options = {
            "q_start": q_start,
            "key_start": key_start,
            "key_lens": key_lens,
            "mask": mask,
        }
        if layer_memory is not None:
            self._check("layer_memory", layer_memory, batch=x.shape[0])
            options["mem_k"], options["mem_v"] = self.project_kv(layer_memory)
        return self._attend(self._project(x), options, positions, *biases)

    def project_kv(self, layer_memory: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values [B, n_kv_head, M, d_head] of hidden states [B, M, d_model]."""
        if is_plain(self.qkv_net):
            first = self.n_head * self.d_head  # rows before it compute queries
            bias = None if self.qkv_net.bias is None else self.qkv_net.bias[first:]
            memory_kv = F.linear(layer_memory, self.qkv_net.weight[first:], bias)
            k, v = split_heads(memory_kv, (self.n_kv_head, self.n_kv_head))
            return k, v
        if layer_memory.shape[1] == 0:  # not every quantised layer accepts it
            return None, None
        projected = self._project(layer_memory)
        return projected.k, projected.v

    def project_r(self, embedding: Tensor) -> Tensor:
        """The position keys [1, n_head, R, d_head] of `RelativePositions.embedding`."""
        (r,) = split_heads(self.r_net(embedding)[None], (self.n_head,))
        return r

    def _project(self, x: Tensor) -> Projected:
        heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        return Projected(*split_heads(linear(self.qkv_net, x), heads))

    def _attend(
        self,
        projected: Projected,
        options: Options,
        positions: RelativePositions | None = None,
        r_w_bias: Tensor | None = None,
        r_r_bias: Tensor | None = None,
    ) -> Tensor:
        q, k, *_ = projected
        mem_k = options.get("mem_k")
        n_keys = k.shape[2] if mem_k is None else mem_k.shape[2] + k.shape[2]
        if positions is None:
            positions = self.pos_emb(
                q.shape[2],
                n_keys,
                dtype=q.dtype,
                device=q.device,
                anywhere=options.get("q_start") is not None,
            )
        r = self.project_r(positions.embedding)
        projected = projected._replace(r=r)
        biases = self._biases(r_w_bias, r_r_bias)
        out = self._rel_attention(projected, options, positions, *biases)
        return linear(self.o_net, out.transpose(1, 2).flatten(2))

    def _attend_window(
        self, x: Tensor, window: LayerWindow, r_w_bias: Tensor | None, r_r_bias: Tensor | None
    ) -> Tensor:
        """Attention in the dtype of the window, whatever that of `x` is."""
        projected = self._project(x)
        extended = window.extended(projected)
        _, options, positions = window.placement
        dtype = window.kv.dtype
        w, r = (
            # The op accepts a bias in float32 or in the dtype of the queries.
            bias if bias is None or bias.dtype in (torch.float32, dtype) else bias.float()
            for bias in self._biases(r_w_bias, r_r_bias)
        )
        with outside_autocast(x.device):
            out = self._rel_attention(extended, options, positions, w, r)
        return linear(self.o_net, out.transpose(1, 2).flatten(2).to(projected.q.dtype))

    def _biases(
        self, r_w_bias: Tensor | None, r_r_bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The given biases; in place of None the module's own."""
        return (
            self.r_w_bias if r_w_bias is None else r_w_bias,
            self.r_r_bias if r_r_bias is None else r_r_bias,
        )

    def _rel_attention(
        self,
        projected: Projected,
        options: Options,
        positions: RelativePositions,
        r_w_bias: Tensor | None,
        r_r_bias: Tensor | None,
    ) -> Tensor:
        """[B, n_head, T, d_head], of the T queries in `projected`."""
        q, k, v, _, r = projected
        assert r is not None  # both callers give it
        return rel_attention(
            q,
            k,
            v,
            r,
            r_w_bias=r_w_bias,
            r_r_bias=r_r_bias,
            offset=positions.offset,
            clamp=positions.clamp,
            causal=positions.causal,
            window=positions.window,
            dropout_p=self.dropatt if self.training else 0.0,
            backend=self.backend,
            **options,
        )
