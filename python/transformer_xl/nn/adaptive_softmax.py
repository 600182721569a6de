"""Adaptive softmax: frequent words beside one column per cluster of rarer ones, losses in token
order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from transformer_xl.nn.embedding import checked_cutoffs, checked_sizes, has_projection
from transformer_xl.nn.sampled_softmax import LogUniformSampler, sampled_nll
from txl_kernels import (
    adaptive_log_prob,
    adaptive_loss,
    adaptive_nll,
    adaptive_sample,
    adaptive_topk,
)
from txl_kernels.ops.checks import check_int

Reduction = Literal["mean", "sum", "none"]
IGNORED = -100  # the target that is not scored
Tail = tuple[Tensor | None, Tensor, Tensor | None]  # projection, weight, bias


class Options(TypedDict):
    """What the losses and the log-probabilities take beside the weights."""

    cutoffs: tuple[int, ...]
    head_bias: Tensor
    head_proj: Tensor | None
    backend: str


class AdaptiveSoftmax(nn.Module):
    """-log p(token) = -log p_head(cluster of the token) - log p_cluster(token).

    Tokens before the first cutoff stand in the head themselves, beside cluster k in column
    cutoffs[0] + k. Without cutoffs this is a plain softmax.

    Args:
        vocab_size, d_embed, d_proj, cutoffs, div_val, proj_same_dim: as `AdaptiveEmbedding`;
            d_proj is the width of the hidden states.
        n_sample: while training, draws that the sum over all V is estimated from, as
            `SampledSoftmax` does; 0: none, the loss is exact. Not with cutoffs.
        backend: "auto", or the implementation that must run.

    State: `out_layers.k.weight` [V_k, d_k] and `.bias` (one layer with all of V for div_val = 1),
    `out_projs.k` [d_proj, d_k] per cluster, `cluster_weight` [n_tails, d_embed], `cluster_bias`.
    Source: Grave et al. 2017; the projections are the Transformer-XL code's.
    """

    def __init__(
        self,
        vocab_size: int,
        d_embed: int,
        d_proj: int,
        cutoffs: tuple[int, ...] = (),
        div_val: int = 1,
        *,
        proj_same_dim: bool = True,
        n_sample: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        vocab_size, d_embed, d_proj, div_val = checked_sizes(
            op, vocab_size=vocab_size, d_embed=d_embed, d_proj=d_proj, div_val=div_val
        )
        cutoffs = checked_cutoffs(op, cutoffs)
        n_sample = check_int(op, "n_sample", n_sample)
        if n_sample < 0 or (n_sample > 0 and cutoffs):
            raise ValueError(
                f"n_sample: expected 0 or, without cutoffs, more, got {n_sample} "
                f"with cutoffs {list(cutoffs)}"
            )
        self.sampler, self.n_sample = LogUniformSampler(vocab_size), n_sample
        self.cutoffs = cutoffs
        self.ends = (0, *cutoffs, vocab_size)
        self.backend = backend
        self.out_layers = nn.ModuleList()
        self.out_projs = nn.ParameterList()
        for k in range(len(cutoffs) + 1):
            width = d_embed // div_val**k
            if div_val > 1:
                self.out_layers.append(nn.Linear(width, self.ends[k + 1] - self.ends[k]))
            if has_projection(width, d_proj, div_val, proj_same_dim):
                projection = torch.randn(d_proj, width) * d_proj**-0.5
                self.out_projs.append(nn.Parameter(projection))
            else:
                self.out_projs.append(None)
        if div_val == 1:
            self.out_layers.append(nn.Linear(d_embed, vocab_size))
        if cutoffs:
            self.cluster_weight = nn.Parameter(torch.zeros(len(cutoffs), d_embed))
            self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs)))

    def forward(self, hidden: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Loss in nats of `target` int64 […] given `hidden` […, d_proj]; -100 is not scored.

        Returns:
            A scalar over the scored targets ("mean", "sum"), or […] in token order ("none").

        Raises:
            IndexError: a target out of range (on the CPU; a device assert on CUDA).
            ValueError: an unknown reduction.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
        head, tails, options = self._clusters()
        rows, scored = hidden.flatten(0, -2), target.flatten()
        if self.training and self.n_sample > 0:
            nll = self._sampled_nll(rows, scored)
            if reduction == "mean":
                return nll.sum() / (scored != IGNORED).sum().clamp(min=1)
            return nll.sum() if reduction == "sum" else nll.view_as(target)
        if reduction == "none":
            return adaptive_nll(rows, scored, head, tails, **options).view_as(target)
        return adaptive_loss(rows, scored, head, tails, **options, reduction=reduction)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """[…, d_proj] to the log-probabilities […, V] of all tokens, in token order."""
        head, tails, options = self._clusters()
        log_prob = adaptive_log_prob(hidden.flatten(0, -2), head, tails, **options)
        return log_prob.view(*hidden.shape[:-1], -1)

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[…, d_proj] to log p and int64 of the k likeliest tokens, likeliest first: […, k]."""
        head, tails, options = self._clusters()
        found = adaptive_topk(hidden.flatten(0, -2), head, tails, k, **options)
        log_probs, tokens = (part.view(*hidden.shape[:-1], k) for part in found)
        return log_probs, tokens

    def sample(
        self,
        hidden: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """[…, d_proj] to one drawn token each, int64 […]; see `txl_kernels.adaptive_sample`."""
        head, tails, options = self._clusters()
        tokens = adaptive_sample(
            hidden.flatten(0, -2),
            head,
            tails,
            **options,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
        return tokens.view(hidden.shape[:-1])

    def _sampled_nll(self, rows: Tensor, target: Tensor) -> Tensor:
        """[N] estimated losses of `target` [N], 0 where it is not scored."""
        if self.out_projs[0] is not None:
            rows = rows @ self.out_projs[0]
        weight, bias = (self.out_layers[0].get_parameter(name) for name in ("weight", "bias"))
        scored = target != IGNORED
        token = target.where(scored, 0)
        nll = sampled_nll(rows, token, weight, bias, self.sampler, self.n_sample)
        return nll.where(scored, 0.0)

    def _clusters(self) -> tuple[Tensor, list[Tail], Options]:
        """Head weight, tails and the rest as the functions of `txl_kernels` take them."""
        projections = [None if p is None else p.t() for p in self.out_projs]  # [d_k, d_proj]
        weights, biases = self._bins()
        head_weight, head_bias = weights[0], biases[0]
        if self.cutoffs:
            clusters = self.cluster_weight.to(head_weight.dtype)
            head_weight = torch.cat([head_weight, clusters])  # [c0 + n_tails, d_embed]
            head_bias = torch.cat([head_bias, self.cluster_bias])
        tails: list[Tail] = list(zip(projections[1:], weights[1:], biases[1:], strict=True))
        options: Options = {
            "cutoffs": self.cutoffs,
            "head_bias": head_bias,
            "head_proj": projections[0],
            "backend": self.backend,
        }
        return head_weight, tails, options

    def _bins(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weight and bias of each bin; for div_val = 1 they are parts of one layer."""
        weights, biases = (
            [layer.get_parameter(name) for layer in self.out_layers] for name in ("weight", "bias")
        )
        if len(weights) == len(self.cutoffs) + 1:
            return list(weights), list(biases)
        sizes = [right - left for left, right in itertools.pairwise(self.ends)]
        table: Tensor = weights[0]
        device = table.device.type
        if table.dtype == torch.float32 and torch.is_autocast_enabled(device):
            table = table.to(torch.get_autocast_dtype(device))  # whole: its parts stay one table
        return _rows_of(table, sizes), list(torch.split(biases[0], sizes))


def _rows_of(table: Tensor, sizes: list[int]) -> list[Tensor]:
    """The bins' rows of one table, whose gradients are joined once, into a new table or in place.

    Slices would fill a table of zeros each.
    """
    if torch.compiler.is_compiling():
        return list(torch.split(table, sizes))
    rows: tuple[Tensor, ...] = _Rows.apply(table, sizes)  # type: ignore[no-untyped-call]
    return list(rows)


class _Rows(torch.autograd.Function):
    """`torch.split` along rows; backward copies no tail where the tails' gradients already lie in
    one table, behind room for the head's words."""

    @staticmethod
    def forward(_ctx: Any, table: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return torch.split(table, sizes)

    @staticmethod
    def backward(_ctx: Any, words: Tensor, *tails: Tensor) -> tuple[Tensor, None]:
        joined = _table_behind(words, tails)
        if joined is None:
            return torch.cat([words, *tails]), None
        joined[: len(words)] = words
        return joined, None


def _table_behind(words: Tensor, tails: Sequence[Tensor]) -> Tensor | None:
    """The table that the tails are the last rows of, if they are rows of one and it is whole."""
    memory, offset = tails[0].untyped_storage(), words.numel()
    for tail in tails:
        same = tail.untyped_storage().data_ptr() == memory.data_ptr()
        if not (same and tail.is_contiguous() and tail.storage_offset() == offset):
            return None
        offset += tail.numel()
    if memory.nbytes() != offset * tails[0].element_size():
        return None
    n_rows, width = len(words) + sum(map(len, tails)), words.shape[1]
    return tails[0].as_strided((n_rows, width), (width, 1), 0)
