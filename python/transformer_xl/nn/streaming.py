"""Attention over a stream of blocks: the cache of projected keys and values, and the base class of
the attention modules that use it."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from transformer_xl.memory import bounded
from transformer_xl.nn.layer_weights import update_weights
from transformer_xl.nn.valid_frames import ValidFrames
from txl_kernels.ops.checks import check_int


class KeyValueCache(NamedTuple):
    """Projected keys and values of the last tokens of each row, newest last.

    `k`, `v` [B, n_kv_head, M, d_head]: row b holds tokens at start[b] <= j < M, without gaps; other
    positions hold arbitrary values. `start`: int64 [B].
    """

    k: Tensor
    v: Tensor
    start: Tensor

    def extended(
        self, k: Tensor, v: Tensor, valid: ValidFrames | None, cache_len: int
    ) -> KeyValueCache:
        """The last `cache_len` tokens of each row from this cache and then from a block.

        Args:
            k, v: [B, n_kv_head, T, d_head], the valid frames first.
            valid: the number of valid frames of each row; None: all T.
            cache_len: the most tokens kept per row.
        """
        k, v = (torch.cat(pair, dim=2).detach() for pair in ((self.k, k), (self.v, v)))
        length = bounded(k.shape[2], at_most=cache_len)
        if valid is None:
            dropped = k.shape[2] - length
            return KeyValueCache(
                k[:, :, dropped:], v[:, :, dropped:], (self.start - dropped).clamp(min=0)
            )
        first = self.k.shape[2] + valid.length - length  # [B]; negative: the row is not full yet
        index = (first[:, None] + torch.arange(length, device=k.device)).clamp(min=0)
        index = index[:, None, :, None]  # [B, 1, length, 1]
        k, v = (part.take_along_dim(index, dim=2) for part in (k, v))
        return KeyValueCache(k, v, (self.start - first).clamp(min=0))


class Projected(NamedTuple):
    """Projections of a block, arguments of `txl_kernels.rel_attention`.

    `q` [B, n_head, T, d_head]; `k`, `v` [B, n_kv_head, T, d_head]; `q_pos` [B, n_head, T, d_rel]
    and `r` [1, 1, R, d_rel] where the position term has a query of its own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_pos: Tensor | None = None
    r: Tensor | None = None


class Options(TypedDict, total=False):
    """Arguments that are passed to `txl_kernels.rel_attention` unchanged."""

    mem_k: Tensor | None
    mem_v: Tensor | None
    q_start: Tensor | None
    key_start: Tensor | None
    key_lens: Tensor | None
    mask: Tensor | None


class StreamingAttention(nn.Module):
    """An attention module that can process a stream block by block with a `KeyValueCache`.

    A subclass defines `_project` and `_attend` and sets `d_model`.
    """

    d_model: int

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
        projected = self._project(x)
        k, v = projected.k, projected.v
        if cache is None:
            start = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
            cache = KeyValueCache(k[:, :, :0], v[:, :, :0], start)
        options: Options = {
            "mem_k": cache.k,
            "mem_v": cache.v,
            "key_start": cache.start,
            "key_lens": None if valid is None else cache.k.shape[2] + valid.length,
        }
        out = self._attend(projected, options)
        if valid is not None:
            out = valid.from_front(out)
        return out, cache.extended(k, v, valid, cache_len)

    def _project(self, x: Tensor) -> Projected:
        """Queries, keys and values of the block x [B, T, d_model]."""
        raise NotImplementedError

    def _attend(self, projected: Projected, options: Options) -> Tensor:
        """Attention from a block to the memory in `options` and itself: [B, T, d_model]."""
        raise NotImplementedError

    def _check(self, name: str, hidden: Tensor, *, batch: int | None) -> None:
        if (
            hidden.dim() != 3
            or hidden.shape[2] != self.d_model
            or batch not in (None, hidden.shape[0])
        ):
            rows = "B" if batch is None else batch
            got = list(hidden.shape)
            raise ValueError(f"{name}: expected [{rows}, T, {self.d_model}], got {got}")


def check_heads(op: str, n_head: int, n_kv_head: int | None, d_head: int) -> tuple[int, int, int]:
    """The three sizes as Python integers; `n_kv_head` defaults to `n_head`.

    Raises:
        TypeError: not an integer.
        ValueError: not positive, or n_head is not a multiple of n_kv_head.
    """
    sizes = {"n_head": n_head, "n_kv_head": n_head if n_kv_head is None else n_kv_head}
    checked = {k: check_int(op, k, size) for k, size in {**sizes, "d_head": d_head}.items()}
    for name, size in checked.items():
        if size <= 0:
            raise ValueError(f"{name}: expected a positive integer, got {size}")
    n_head, n_kv_head, d_head = checked.values()
    if n_head % n_kv_head:
        raise ValueError(f"n_kv_head: expected a divisor of n_head {n_head}, got {n_kv_head}")
    return n_head, n_kv_head, d_head


def split_heads(projected: Tensor, heads: tuple[int, ...]) -> tuple[Tensor, ...]:
    """[B, T, sum(heads) · d_head] into one view [B, n, T, d_head] for each n in `heads`."""
    B, T, width = projected.shape
    n_heads = sum(heads)
    parts = projected.view(B, T, n_heads, width // n_heads).split_with_sizes(heads, dim=2)
    return tuple(part.transpose(1, 2) for part in parts)
