"""Causal self-attention of large language models: grouped key heads, no position embedding but a
content-dependent relative bias."""

from __future__ import annotations

from torch import Tensor, nn

from transformer_xl.nn.position import Window
from transformer_xl.nn.relative_bias import RelativeBias
from transformer_xl.nn.streaming import (
    Options,
    Projected,
    StreamingAttention,
    check_heads,
    split_heads,
)
from txl_kernels import banded_attention, banded_is_faster, rel_attention
from txl_kernels.ops.checks import check_int, check_number, checked_window
from txl_kernels.transforms import inside_transform, is_exporting


class GroupedQueryAttention(StreamingAttention):
    """softmax(scale · q·k + pos_scale · bias) v, causal, projected back.

    Query head h attends to key head h // (n_head / n_kv_head). All projections are without bias.

    Args:
        d_model, n_head, d_head: sizes; n_head · d_head need not be d_model.
        n_kv_head: heads of keys and values, a divisor of n_head.
        rel: the relative bias, with this d_model and n_head. It may be shared by several layers.
        window: (left, right), the most tokens to the left of a query that it attends to; None: no
            limit. `right` has no effect on causal attention. A sliding layer of Inkling, which
            sees W tokens, has W - 1.
        scale: factor of the content term; default 1/√d_head. Inkling normalises q and k per head
            and uses 1/d_head.
        pos_scale: factor of the bias.
        backend: "auto", or the only implementation of `rel_attention` that may run.

    Source: Ainslie et al. 2023 (grouped queries); Thinking Machines' Inkling, 2026 (bias).
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_kv_head: int,
        d_head: int,
        *,
        rel: RelativeBias,
        window: Window | None = None,
        scale: float | None = None,
        pos_scale: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        self.d_model = check_int(op, "d_model", d_model, at_least=1)
        self.n_head, self.n_kv_head, self.d_head = check_heads(op, n_head, n_kv_head, d_head)
        if (rel.d_model, rel.n_head) != (self.d_model, self.n_head):
            expected = f"d_model {self.d_model}, n_head {self.n_head}"
            raise ValueError(f"rel: expected {expected}, got {rel.d_model}, {rel.n_head}")
        self.window = None if window is None else checked_window(op, window)
        self.scale = self.d_head**-0.5 if scale is None else check_number(op, "scale", scale)
        self.pos_scale = check_number(op, "pos_scale", pos_scale)
        self.backend = backend
        width, kv_width = self.n_head * self.d_head, self.n_kv_head * self.d_head
        self.q_proj = nn.Linear(self.d_model, width, bias=False)
        self.k_proj = nn.Linear(self.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(self.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(width, self.d_model, bias=False)
        self.rel = rel

    def forward(
        self,
        x: Tensor,
        *,
        mem_k: Tensor | None = None,
        mem_v: Tensor | None = None,
        q_start: Tensor | None = None,
        key_start: Tensor | None = None,
        key_lens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each token of `x` to itself and to the tokens before it.

        `stream` keeps the keys and values of earlier blocks itself. With a preallocated cache,
        write the keys and values of `x` (`project_kv`) into it first; `q_start` and `key_lens` then
        make the queries read them there.

        Args:
            x: [B, T, d_model].
            mem_k, mem_v: [B, n_kv_head, M, d_head], keys and values before those of `x`.
            q_start: int32 or int64 [B], the position of each row's first query among the M + T
                keys; default M.
            key_start, key_lens: int32 or int64 [B] or [B, T]: row b (query i) attends to keys
                key_start <= j < key_lens.
            mask: bool, broadcastable to [B, n_head, T, M + T], True = attend.

        Returns:
            [B, T, d_model].

        Raises:
            ValueError: `x` of another shape.
        """
        self._check("x", x, batch=None)
        options: Options = {
            "mem_k": mem_k,
            "mem_v": mem_v,
            "q_start": q_start,
            "key_start": key_start,
            "key_lens": key_lens,
            "mask": mask,
        }
        return self._attend(self._project(x), options)

    def project_kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, n_kv_head, T, d_head] of `x`, for a cache that the caller fills."""
        self._check("x", x, batch=None)
        (k,) = split_heads(self.k_proj(x), (self.n_kv_head,))
        (v,) = split_heads(self.v_proj(x), (self.n_kv_head,))
        return k, v

    def _project(self, x: Tensor) -> Projected:
        (q,) = split_heads(self.q_proj(x), (self.n_head,))
        return Projected(q, *self.project_kv(x), *self.rel(x))

    def _attend(self, projected: Projected, options: Options) -> Tensor:
        call = {
            **projected._asdict(),
            "scale": self.scale,
            "pos_scale": self.pos_scale,
            "backend": self.backend,
        }
        if self._is_banded(projected, options):
            out = banded_attention(**call)
        else:
            mem_k = options.get("mem_k")
            n_memory = 0 if mem_k is None else mem_k.shape[2]  # Tk - Tq
            out = rel_attention(
                **call,
                offset=self.rel.extent - 1 - n_memory,
                causal=True,
                window=self.window,
                **options,
            )
        attended: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))  # out [B, H, T, d_head]
        return attended

    def _is_banded(self, projected: Projected, options: Options) -> bool:
        """Whether all keys before a query are visible and two kernels are faster than one.

        False under `torch.export`, whose programs serve lengths on both sides of the limit.
        """
        q = projected.q
        return (
            self.window is None
            and all(option is None for option in options.values())
            and not is_exporting()
            and not inside_transform("grad", "jvp", "vmap")
            and banded_is_faster(q.shape[2], self.rel.extent, self.d_head, self.rel.d_rel, q.device)
        )
