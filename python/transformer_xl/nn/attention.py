"""Multi-head attention with Transformer-XL relative positions over [memory; segment]: parameters
and projections around `txl_kernels.rel_attention`."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_xl.nn.position import RelativePositions, SinusoidalPositions, Window
from txl_kernels import rel_attention
from txl_kernels.ops.checks import check_int, check_number


class KeyValueCache(NamedTuple):
    """Projected keys and values [B, H, M, d_head] of the tokens just before a block."""

    k: Tensor
    v: Tensor


class Options(TypedDict, total=False):
    """What goes to `txl_kernels.rel_attention` as it came."""

    r_w_bias: Tensor | None
    r_r_bias: Tensor | None
    key_start: Tensor | None
    key_lens: Tensor | None
    mask: Tensor | None


class RelativeMultiHeadAttention(nn.Module):
    """softmax((q + r_w_bias)·k + (q + r_r_bias)·r, scaled by 1/√d_head) v, projected back.

    Queries come from the segment only; memory and segment are projected without being
    concatenated, and the kernel reads both places.

    Args:
        d_model, n_head, d_head: sizes; n_head · d_head need not be d_model.
        causal: a token sees itself and what came before; False: both directions.
        window: (left, right) tokens seen around a query; a side None is open.
        clamp_len: distances beyond it (in tokens) share one embedding; 0 or less: no clamp.
        dropatt: dropout on the attention probabilities, in training.
        untie_r: own `r_w_bias`, `r_r_bias` (zeros at first); False: the caller passes them.
        backend: "auto", or the implementation of `rel_attention` that must run.

    Source: Dai et al. 2019, section 3.3.
    """

    r_w_bias: nn.Parameter | None
    r_r_bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_head: int,
        *,
        causal: bool = True,
        window: Window | None = None,
        clamp_len: int = -1,
        dropatt: float = 0.0,
        untie_r: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        n_head, d_head = check_int(op, "n_head", n_head), check_int(op, "d_head", d_head)
        for name, size in (("n_head", n_head), ("d_head", d_head)):
            if size <= 0:
                raise ValueError(f"{name}: expected a positive integer, got {size}")
        self.n_head, self.d_head = n_head, d_head
        self.dropatt = check_number(op, "dropatt", dropatt, at_least=0)
        self.backend = backend
        self.pos_emb = SinusoidalPositions(
            d_model, causal=causal, window=window, clamp_len=clamp_len
        )
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        for name in ("r_w_bias", "r_r_bias"):
            bias = nn.Parameter(torch.zeros(n_head, d_head)) if untie_r else None
            self.register_parameter(name, bias)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        positions: RelativePositions | None = None,
        r_w_bias: Tensor | None = None,
        r_r_bias: Tensor | None = None,
        key_start: Tensor | None = None,
        key_lens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each token of `x` to `[memory; x]`.

        Args:
            x: [B, T, d_model].
            memory: [B, M, d_model], hidden states of the M tokens before `x`, or None.
            positions: of T queries among M + T keys, embedding [R, d_model]; None: computed from
                this module's own `causal`, `window` and `clamp_len`.
            r_w_bias, r_r_bias: [n_head, d_head], where the module has none of its own.
            key_start, key_lens: integers [B], counted over [memory; x]: keys before the one and
                from the other on are not there.
            mask: bool, broadcastable to [B, n_head, T, M + T], True = attend.

        Returns:
            [B, T, d_model].

        Raises:
            ValueError: `x` or `memory` of another shape.
        """
        self._check("x", x, batch=None)
        before = None
        if memory is not None:
            self._check("memory", memory, batch=x.shape[0])
            kv_weight = self.qkv_net.weight[self.n_head * self.d_head :]
            before = KeyValueCache(*self._split_heads(F.linear(memory, kv_weight)))
        q, k, v = self._split_heads(self.qkv_net(x))
        options: Options = {
            "r_w_bias": self.r_w_bias if r_w_bias is None else r_w_bias,
            "r_r_bias": self.r_r_bias if r_r_bias is None else r_r_bias,
            "key_start": key_start,
            "key_lens": key_lens,
            "mask": mask,
        }
        return self._attend(q, KeyValueCache(k, v), before, positions, options)

    def stream(
        self, x: Tensor, cache: KeyValueCache | None = None, *, cache_len: int
    ) -> tuple[Tensor, KeyValueCache]:
        """Attend from a block to `[cache; x]` and carry the last `cache_len` keys and values on.

        Equals `forward` on the whole sequence as long as `cache_len` covers what a query sees and
        nothing is seen to the right of a block. The cache carries no gradient.

        Returns:
            Output [B, T, d_model] and the cache for the next block.

        Raises:
            ValueError: `x` of another shape, a negative `cache_len`.
        """
        cache_len = check_int(f"{type(self).__name__}.stream", "cache_len", cache_len)
        if cache_len < 0:
            raise ValueError(f"cache_len: expected 0 or more tokens, got {cache_len}")
        self._check("x", x, batch=None if cache is None else cache.k.shape[0])
        q, k, v = self._split_heads(self.qkv_net(x))
        before = KeyValueCache(k[:, :, :0], v[:, :, :0]) if cache is None else cache
        biases: Options = {"r_w_bias": self.r_w_bias, "r_r_bias": self.r_r_bias}
        out = self._attend(q, KeyValueCache(k, v), before, None, biases)
        k, v = (torch.cat(pair, dim=2).detach() for pair in ((before.k, k), (before.v, v)))
        dropped = max(k.shape[2] - cache_len, 0)
        return out, KeyValueCache(k[:, :, dropped:], v[:, :, dropped:])

    def _attend(
        self,
        q: Tensor,
        segment: KeyValueCache,
        before: KeyValueCache | None,
        positions: RelativePositions | None,
        options: Options,
    ) -> Tensor:
        """Queries [B, H, T, d_head] over the keys of `before` and `segment`; [B, T, d_model]."""
        n_queries = q.shape[2]
        n_keys = n_queries if before is None else before.k.shape[2] + n_queries
        weight = self.r_net.weight
        if positions is None:
            positions = self.pos_emb(n_queries, n_keys, dtype=weight.dtype, device=weight.device)
        (r,) = self._split_heads(self.r_net(positions.embedding)[None])  # [1, H, R, d_head]
        out = rel_attention(
            q,
            segment.k,
            segment.v,
            r,
            mem_k=None if before is None else before.k,
            mem_v=None if before is None else before.v,
            offset=positions.offset,
            clamp=positions.clamp,
            causal=positions.causal,
            window=positions.window,
            dropout_p=self.dropatt if self.training else 0.0,
            backend=self.backend,
            **options,
        )  # [B, H, T, d_head]
        attended: Tensor = self.o_net(out.transpose(1, 2).flatten(2))
        return attended

    def _split_heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """[B, T, n · n_head · d_head] into n views [B, n_head, T, d_head]."""
        B, T, width = projected.shape
        n = width // (self.n_head * self.d_head)
        heads = projected.view(B, T, n, self.n_head, self.d_head)
        return tuple(heads.permute(2, 0, 3, 1, 4))

    def _check(self, name: str, hidden: Tensor, *, batch: int | None) -> None:
        d_model = self.qkv_net.in_features
        if hidden.dim() != 3 or hidden.shape[2] != d_model or batch not in (None, hidden.shape[0]):
            rows = "B" if batch is None else batch
            got = list(hidden.shape)
            raise ValueError(f"{name}: expected [{rows}, T, {d_model}], got {got}")
