"""Adaptive softmax: columns for frequent tokens and one for each cluster of rarer tokens; losses in
token order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from transformer_xl.nn.embedding import checked_cutoffs, checked_sizes, has_projection
from transformer_xl.nn.layer_weights import projections_of, update_weights, weight_and_bias
from transformer_xl.nn.linear import is_few_rows
from transformer_xl.nn.sampled_softmax import LogUniformSampler, sampled_nll
from txl_kernels import (
    adaptive_log_prob,
    adaptive_loss,
    adaptive_nll,
    adaptive_sample,
    adaptive_topk,
    few_row_linear,
)
from txl_kernels.ops.autocast import autocast_dtype, cast
from txl_kernels.ops.checks import check_int
from txl_kernels.transforms import inside_transform

Reduction = Literal["mean", "sum", "none"]
IGNORED = -100  # targets of this value are not scored
Tail = tuple[Tensor | None, Tensor, Tensor | None]  # projection, weight, bias


class Options(TypedDict):
    """Arguments of the losses and log-probabilities besides head weight and tails."""

    cutoffs: tuple[int, ...]
    head_bias: Tensor | None
    head_proj: Tensor | None
    backend: str


class AdaptiveSoftmax(nn.Module):
    """-log p(token) = -log p_head(cluster of the token) - log p_cluster(token).

    The head has a column for each token before the first cutoff and then, in column cutoffs[0] + k,
    one for cluster k. Without cutoffs this is a plain softmax.

    The kernels read the weights of `out_layers` and do not call these layers: weights of
    `torch.nn.utils.prune`, `weight_norm` and parametrisations are computed first, quantised weights
    (torchao) are dequantised outside training; LoRA wrappers must be merged.

    Args:
        vocab_size, d_embed, d_proj, cutoffs, div_val, proj_same_dim: as in `AdaptiveEmbedding`;
            d_proj is the width of the hidden states.
        n_sample: number of draws from which the sum over all V is estimated in training, as in
            `SampledSoftmax`; 0: the loss is exact. Not with cutoffs.
        backend: "auto", or the only implementation that may run.

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
            A scalar over the scored targets ("mean", "sum"), 0 if there are none; or […] in token
            order ("none").

        Raises:
            IndexError: a target out of range (on the CPU; a device assert on CUDA).
            ValueError: an unknown reduction; a layer that is wrapped, hooked, or quantised in
                training.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected mean, sum or none, got {reduction!r}")
        rows, scored = hidden.flatten(0, -2), target.flatten()
        if self.training and self.n_sample > 0:
            nll = self._sampled_nll(rows, scored)
            if reduction == "mean":
                return nll.sum() / (scored != IGNORED).sum().clamp(min=1)
            return nll.sum() if reduction == "sum" else nll.view_as(target)
        head, tails, options = self._clusters(hidden)
        if reduction == "none":
            return adaptive_nll(rows, scored, head, tails, **options).view_as(target)
        return adaptive_loss(rows, scored, head, tails, **options, reduction=reduction)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """[…, d_proj] to the log-probabilities […, V] of all tokens, in token order."""
        rows = hidden.flatten(0, -2)
        if self.backend == "auto" and is_few_rows(rows):
            log_prob = self._few_row_log_prob(rows)
        else:
            head, tails, options = self._clusters(hidden)
            log_prob = adaptive_log_prob(rows, head, tails, **options)
        return log_prob.view(*hidden.shape[:-1], self.ends[-1])

    def _few_row_log_prob(self, rows: Tensor) -> Tensor:
        """The result of `adaptive_log_prob`; `few_row_linear` reads each weight once, in place."""
        weights, biases, projections = self._layers_of_clusters(rows)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        projected = [rows if p is None else rows @ p.to(rows.dtype) for p in projections]
        shortlist, *tails = map(few_row_linear, projected, weights, biases)
        clusters = rows.new_empty(len(rows), 0)
        if self.cutoffs:
            clusters = few_row_linear(projected[0], self.cluster_weight, self.cluster_bias)
        head = torch.cat([shortlist, clusters], dim=1).log_softmax(1)
        if not tails:
            return head
        log_prob = rows.new_empty(len(rows), self.ends[-1])
        log_prob[:, : self.cutoffs[0]] = head[:, : self.cutoffs[0]]
        for k, logits in enumerate(tails):
            part = log_prob[:, self.ends[k + 1] : self.ends[k + 2]]
            entry = head[:, self.cutoffs[0] + k, None]
            torch.add(logits.log_softmax(1), entry, out=part)
        return log_prob

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[…, d_proj] to the k most probable tokens in descending order: log p and int64 […, k]."""
        head, tails, options = self._clusters(hidden)
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
        head, tails, options = self._clusters(hidden)
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
        (weight,), (bias,), (projection,) = self._layers(rows)
        scored = target != IGNORED
        # A row that is not scored may hold NaN, which a product with 0 keeps.
        rows = rows.masked_fill(~scored[:, None], 0.0)
        if projection is not None:
            rows = rows @ projection
        token = target.where(scored, 0)
        nll = sampled_nll(rows, token, weight, bias, self.sampler, self.n_sample)
        return nll.where(scored, 0.0)

    def _clusters(self, hidden: Tensor) -> tuple[Tensor, list[Tail], Options]:
        """Head weight, tails and further arguments of the functions of `txl_kernels`."""
        weights, biases, projections = self._layers_of_clusters(hidden)
        projections = [None if p is None else p.t() for p in projections]  # [d_k, d_proj]
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

    def _layers_of_clusters(
        self, hidden: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Weight [V_k, d_k], bias and projection [d_proj, d_k] of each cluster's own tokens."""
        update_weights(self)
        weights, biases, projections = self._layers(hidden)
        if len(weights) <= len(self.cutoffs):
            weights, biases = self._split(weights[0], biases[0])
        return weights, biases, projections

    def _layers(self, hidden: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Weight and bias of each layer, projection [d_proj, d_k] of each cluster."""
        trained = self.training and hidden.requires_grad
        weights, biases = [], []
        for k, layer in enumerate(self.out_layers):
            weight, bias = weight_and_bias(self, f"out_layers.{k}", layer, trained=trained)
            weights.append(weight)
            biases.append(weight.new_zeros(len(weight)) if bias is None else bias)
        return weights, biases, projections_of(self, "out_projs", trained=trained)

    def _split(self, table: Tensor, bias: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Each cluster's rows of the one table and bias of div_val = 1."""
        sizes = [right - left for left, right in itertools.pairwise(self.ends)]
        lower = autocast_dtype(table.device)
        if table.dtype == torch.float32:
            table = cast(table, lower)  # as a whole: its parts stay one table
        return _rows_of(table, sizes), list(torch.split(bias, sizes))


def _rows_of(table: Tensor, sizes: list[int]) -> list[Tensor]:
    """Each cluster's rows of one table; backward joins their gradients into one table once.

    Plain slices would each add a table of zeros in backward.
    """
    if torch.compiler.is_compiling() or inside_transform("vmap", "grad", "jvp"):
        return list(torch.split(table, sizes))
    rows: tuple[Tensor, ...] = _Rows.apply(table, sizes)  # type: ignore[no-untyped-call]
    return list(rows)


class _Rows(torch.autograd.Function):
    """`torch.split` along rows. Backward copies no tail's gradient if all of them are the last rows
    of one table, whose first rows are free for the gradient of the head's tokens."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        return torch.split(table, sizes)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, ...]:
        return torch.split(tangent, ctx.sizes)

    @staticmethod
    def backward(_ctx: Any, shortlist: Tensor, *tails: Tensor) -> tuple[Tensor, None]:
        joined = _table_of(shortlist, tails)
        if joined is None:
            return torch.cat([shortlist, *tails]), None
        joined[: len(shortlist)] = shortlist
        return joined, None


def _table_of(shortlist: Tensor, tails: Sequence[Tensor]) -> Tensor | None:
    """The table whose last rows are the tails, or None if there is none with the right size."""
    memory, offset = tails[0].untyped_storage(), shortlist.numel()
    for tail in tails:
        same = tail.untyped_storage().data_ptr() == memory.data_ptr()
        if not (same and tail.is_contiguous() and tail.storage_offset() == offset):
            return None
        offset += tail.numel()
    if memory.nbytes() != offset * tails[0].element_size():
        return None
    n_rows, width = len(shortlist) + sum(map(len, tails)), shortlist.shape[1]
    return tails[0].as_strided((n_rows, width), (width, 1), 0)
