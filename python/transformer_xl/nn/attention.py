"""Multi-head attention with Transformer-XL relative positions over [memory; segment]: the
parameters and projections around `txl_kernels.rel_attention`."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_xl.memory import bounded
from transformer_xl.nn.layer_weights import is_plain, update_weights
from transformer_xl.nn.position import RelativePositions, SinusoidalPositions, Window
from transformer_xl.nn.valid_frames import ValidFrames
from txl_kernels import rel_attention
from txl_kernels.ops.checks import check_int, check_number


class KeyValueCache(NamedTuple):
    """Projected keys and values of the last tokens of each row, newest last.

    `k`, `v` [B, n_head, M, d_head]: row b holds tokens at start[b] <= j < M, without gaps; other
    positions hold arbitrary values. `start`: int64 [B].
    """

    k: Tensor
    v: Tensor
    start: Tensor


class Options(TypedDict, total=False):
    """Arguments that are passed to `txl_kernels.rel_attention` unchanged."""

    r_w_bias: Tensor | None
    r_r_bias: Tensor | None
    mem_k: Tensor | None
    mem_v: Tensor | None
    key_start: Tensor | None
    key_lens: Tensor | None
    mask: Tensor | None


class RelativeMultiHeadAttention(nn.Module):
    """softmax((q + r_w_bias)·k + (q + r_r_bias)·r, scaled by 1/√d_head) v, projected back.

    Queries come from the segment only; memory and segment are projected without being
    concatenated, and the kernel reads both tensors.

    The projections `qkv_net`, `r_net` and `o_net` may carry hooks and may be replaced by wrappers
    (LoRA) or quantised layers. A plain `qkv_net` computes only keys and values of the memory; any
    other is called on the whole memory, and the queries in its result are not used.

    Args:
        d_model, n_head, d_head: sizes; n_head · d_head need not be d_model.
        causal: True: a token attends to itself and to earlier tokens; False: to all tokens.
        window: (left, right), the most tokens to the left and right of a query that it attends to;
            None in place of a number is no limit.
        clamp_len: distances beyond it (in tokens) share one embedding; 0 or less: no clamp.
        dropatt: dropout on the attention probabilities, in training.
        untie_r: True: the module has its own `r_w_bias`, `r_r_bias` (initially zeros); False: the
            caller passes them.
        backend: "auto", or the only implementation of `rel_attention` that may run.

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
            key_start, key_lens: int32 or int64 [B], positions in [memory; x]: row b attends to keys
                key_start[b] <= j < key_lens[b].
            mask: bool, broadcastable to [B, n_head, T, M + T], True = attend.

        Returns:
            [B, T, d_model].

        Raises:
            ValueError: `x` or `memory` of another shape.
        """
        self._check("x", x, batch=None)
        options: Options = {
            "r_w_bias": self.r_w_bias if r_w_bias is None else r_w_bias,
            "r_r_bias": self.r_r_bias if r_r_bias is None else r_r_bias,
            "key_start": key_start,
            "key_lens": key_lens,
            "mask": mask,
        }
        if memory is not None:
            self._check("memory", memory, batch=x.shape[0])
            options["mem_k"], options["mem_v"] = self._memory_kv(memory)
        q, k, v = self._split_heads(self.qkv_net(x))
        return self._attend(q, k, v, positions, options)

    def stream(
        self,
        x: Tensor,
        cache: KeyValueCache | None = None,
        *,
        cache_len: int,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """Attend from a block to `[cache; x]` and keep the last `cache_len` keys and values.

        Only the frames starts[b] <= t < lengths[b] of row b belong to its stream: other frames are
        neither read nor stored, and their outputs are 0. So rows may have blocks of different
        lengths, and a row may pause (no valid frame in this block) and continue later. Each row
        equals that row streamed alone.

        A row equals `forward` on its whole sequence as long as `cache_len` covers all keys that a
        query attends to and no query attends to the right of its block. The cache carries no
        gradient.

        Args:
            x: [B, T, d_model], T may be 0.
            cache: the result of the previous block; None: no tokens precede this block.
            cache_len: the most tokens kept per row, 0 or more.
            lengths, starts: int32 or int64 [B] on x's device, default T and 0; values outside
                [0, T] are clamped to it. `lengths` is the end of the valid frames, not their
                number. The host reads neither.

        Returns:
            Output [B, T, d_model] and the cache for the next block.

        Raises:
            TypeError, ValueError: an argument of another type, shape, dtype, device or range.
        """
        cache_len = check_int(f"{type(self).__name__}.stream", "cache_len", cache_len)
        if cache_len < 0:
            raise ValueError(f"cache_len: expected 0 or more tokens, got {cache_len}")
        self._check("x", x, batch=None if cache is None else cache.k.shape[0])
        update_weights(self)
        valid = None
        if lengths is not None or starts is not None:
            valid = ValidFrames.between("stream", x, starts, lengths)
            x = valid.to_front(x)
        q, k, v = self._split_heads(self.qkv_net(x))
        if cache is None:
            start = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
            cache = KeyValueCache(k[:, :, :0], v[:, :, :0], start)
        n_cached = cache.k.shape[2]
        options: Options = {
            "r_w_bias": self.r_w_bias,
            "r_r_bias": self.r_r_bias,
            "mem_k": cache.k,
            "mem_v": cache.v,
            "key_start": cache.start,
            "key_lens": None if valid is None else n_cached + valid.length,
        }
        out = self._attend(q, k, v, None, options)
        if valid is not None:
            out = valid.from_front(out)
        return out, _extended(cache, k, v, valid, cache_len)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: RelativePositions | None,
        options: Options,
    ) -> Tensor:
        """Queries, keys and values of a segment [B, H, T, d_head]; returns [B, T, d_model]."""
        mem_k = options.get("mem_k")
        n_keys = k.shape[2] if mem_k is None else mem_k.shape[2] + k.shape[2]
        if positions is None:
            positions = self.pos_emb(q.shape[2], n_keys, dtype=q.dtype, device=q.device)
        (r,) = self._split_heads(self.r_net(positions.embedding)[None])  # [1, H, R, d_head]
        out = rel_attention(
            q,
            k,
            v,
            r,
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

    def _memory_kv(self, memory: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values [B, H, M, d_head] of the memory."""
        if is_plain(self.qkv_net):
            first = self.n_head * self.d_head  # rows before it compute queries
            weight, bias = self.qkv_net.weight, self.qkv_net.bias
            kv = F.linear(memory, weight[first:], None if bias is None else bias[first:])
            k, v = self._split_heads(kv)
            return k, v
        if memory.shape[1] == 0:  # not every quantised layer accepts it
            return None, None
        _q, k, v = self._split_heads(self.qkv_net(memory))
        return k, v

    def _split_heads(self, projected: Tensor) -> tuple[Tensor, ...]:
        """[B, T, n · n_head · d_head] into n views [B, n_head, T, d_head]."""
        B, T, width = projected.shape
        n = width // (self.n_head * self.d_head)
        heads = projected.view(B, T, n, self.n_head, self.d_head)
        return tuple(heads.permute(2, 0, 3, 1, 4))

    def _check(self, name: str, hidden: Tensor, *, batch: int | None) -> None:
        d_model = self.pos_emb.d_model
        if hidden.dim() != 3 or hidden.shape[2] != d_model or batch not in (None, hidden.shape[0]):
            rows = "B" if batch is None else batch
            got = list(hidden.shape)
            raise ValueError(f"{name}: expected [{rows}, T, {d_model}], got {got}")


def _extended(
    cache: KeyValueCache, k: Tensor, v: Tensor, valid: ValidFrames | None, cache_len: int
) -> KeyValueCache:
    """The last `cache_len` tokens of each row from the cache and then a block [B, H, T, d_head],
    whose valid frames are at its front."""
    k, v = (torch.cat(pair, dim=2).detach() for pair in ((cache.k, k), (cache.v, v)))
    length = bounded(k.shape[2], at_most=cache_len)
    if valid is None:
        dropped = k.shape[2] - length
        return KeyValueCache(
            k[:, :, dropped:], v[:, :, dropped:], (cache.start - dropped).clamp(min=0)
        )
    first = cache.k.shape[2] + valid.length - length  # [B]; negative: the row is not full yet
    index = (first[:, None] + torch.arange(length, device=k.device)).clamp(min=0)  # [B, length]
    k, v = (part.take_along_dim(index[:, None, :, None], dim=2) for part in (k, v))
    return KeyValueCache(k, v, (cache.start - first).clamp(min=0))
