"""Adaptive softmax in plain PyTorch: the specification of the loss, log-probabilities and top-k.

    -log p(token) = -log p_head(token or its cluster's column) - log p_tail(token in its cluster)

Every token is multiplied with every cluster, a piece of the vocabulary at a time, and the results
of clusters without the token's target are masked: the host never reads a target. Only one piece's
logits are in memory at a time, forward and backward: at most N × max(4096, V_k / 32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from txl_kernels.backends.reference.precision import widened, work_dtype
from txl_kernels.transforms import inside_transform, is_exporting

_MIN_COLUMNS = 4096
_MAX_PIECES = 32


class Cluster(NamedTuple):
    """logits = bias + weight · (projection · hidden), in `nn.Linear`'s orientation."""

    projection: Tensor | None  # [d_k, d]
    weight: Tensor  # [V_k, d_k]; the head's: [c0 + n_tails, d_0]
    bias: Tensor | None  # [V_k]


def nll(
    hidden: Tensor,  # [N, d]
    target: Tensor,  # [N] int64
    head: Cluster,
    tails: Sequence[Cluster],
    ignore_index: int,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Each token's -log p in nats, in token order, 0 where the target is ignored: [N].

    All arithmetic is in `compute_dtype`, by default that of `widened_rows`.
    """
    hidden, head, *tails = widened_rows(hidden, head, *tails, dtype=compute_dtype)
    c0 = head.weight.shape[0] - len(tails)
    n_tokens = c0 + sum(tail.weight.shape[0] for tail in tails)
    counted = target != ignore_index
    # An ignored row may hold NaN, which a product with a gradient of 0 keeps.
    hidden = hidden.masked_fill(~counted[:, None], 0.0)
    token = target.clamp(0, n_tokens - 1)
    column = token.clamp(max=c0 - 1)
    log_prob = hidden.new_zeros(hidden.shape[0])
    first = c0
    for k, tail in enumerate(tails):
        within = token - first
        inside = (within >= 0) & (within < tail.weight.shape[0])
        column = torch.where(inside, c0 + k, column)
        log_prob = torch.where(inside, _log_prob_at(hidden, tail, within), log_prob)
        first = first + tail.weight.shape[0]  # a new tensor inside torch.jit.trace, where c0 is one
    log_prob = log_prob + _log_prob_at(hidden, head, column)
    return -log_prob.masked_fill(~counted, 0.0)


def loss(
    hidden: Tensor,
    target: Tensor,
    head: Cluster,
    tails: Sequence[Cluster],
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Sum of `nll`, or its mean over the targets that are not ignored (0 if all are)."""
    return reduced(nll(hidden, target, head, tails, ignore_index), target, ignore_index, reduction)


def reduced(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """`loss` from the losses [N] of all tokens."""
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum().clamp(min=1)


def log_prob(
    hidden: Tensor,
    head: Cluster,
    tails: Sequence[Cluster],
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """log p of every token: [N, V]; `compute_dtype` as for `nll`."""
    hidden, head, *tails = widened_rows(hidden, head, *tails, dtype=compute_dtype)
    c0 = head.weight.shape[0] - len(tails)
    head_log_probs = _log_probs(hidden, head)  # [N, c0 + n_tails]
    parts = [head_log_probs[:, :c0]]
    for k, tail in enumerate(tails):
        parts.append(_log_probs(hidden, tail) + head_log_probs[:, c0 + k, None])
    return torch.cat(parts, dim=1)


@torch.no_grad()
def topk(hidden: Tensor, head: Cluster, tails: Sequence[Cluster], k: int) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of each row, in descending order: log p and tokens, [N, k]."""
    hidden, head, *tails = widened_rows(hidden, head, *tails)
    c0 = head.weight.shape[0] - len(tails)
    x = projected(hidden, head)
    head_lse = _lse(x, head)[:, None]
    entry = logits_of(x, columns(head, c0, None)) - head_lse  # log p of each tail: [N, n_tails]
    best = x.new_empty(x.shape[0], 0)
    tokens = torch.empty_like(best, dtype=torch.int64)
    n_before = 0
    for n, cluster in enumerate((columns(head, 0, c0), *tails)):
        x = projected(hidden, cluster)
        shift = -head_lse if n == 0 else entry[:, n - 1, None] - _lse(x, cluster)[:, None]
        for first, piece in pieces(cluster):
            log_probs = logits_of(x, piece) + shift
            token = torch.arange(log_probs.shape[1], device=x.device) + (n_before + first)
            best, tokens = _best_of_both(best, tokens, log_probs, token.expand_as(log_probs), k)
        n_before = n_before + cluster.weight.shape[0]
    return best, tokens


def _best_of_both(
    best: Tensor, tokens: Tensor, log_probs: Tensor, new_tokens: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    candidates = torch.cat([best, log_probs], dim=1)
    best, kept = candidates.topk(min(k, candidates.shape[1]), dim=1)
    return best, torch.cat([tokens, new_tokens], dim=1).gather(1, kept)


def _log_prob_at(hidden: Tensor, cluster: Cluster, column: Tensor) -> Tensor:
    """log softmax of one column per row: [N]; undefined where the column is out of range."""
    x = projected(hidden, cluster)
    lses, logit = [], x.new_zeros(x.shape[0])
    for first, piece in pieces(cluster):
        lse, here = _recomputed(_lse_and_logit_at, x, piece.weight, piece.bias, column - first)
        lses.append(lse)
        logit = logit + here
    return logit - torch.stack(lses).logsumexp(0)


def _recomputed(function: Callable[..., Any], *args: Tensor | None) -> Any:
    """Calls the function so that backward recomputes its intermediate tensors.

    torch.export cannot trace such a call, and the transforms of torch.func do not run it: there
    these tensors are kept.
    """
    if is_exporting() or inside_transform("vmap", "grad", "jvp"):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _lse_and_logit_at(
    x: Tensor, weight: Tensor, bias: Tensor | None, column: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over one piece, and the logit of `column`, 0 if in another piece: [N] each."""
    logits = logits_of(x, Cluster(None, weight, bias))
    within = column.clamp(0, logits.shape[1] - 1)
    logit = logits.gather(1, within[:, None])[:, 0]
    return logits.logsumexp(1), logit.masked_fill(within != column, 0.0)


def _lse(x: Tensor, cluster: Cluster) -> Tensor:
    """Log-sum-exp of a cluster's logits: [N]."""
    lses = [logits_of(x, piece).logsumexp(1) for _, piece in pieces(cluster)]
    return torch.stack(lses).logsumexp(0)


def _log_probs(hidden: Tensor, cluster: Cluster) -> Tensor:
    return logits_of(projected(hidden, cluster), cluster).log_softmax(1)


def widened_rows(hidden: Tensor, *clusters: Cluster, dtype: torch.dtype | None = None) -> Any:
    """`hidden` and the clusters, with hidden and the projections in the dtype of all sums.

    That is `dtype`, by default float32, or float64 for float64. Each is cast once for all clusters,
    so that its gradient is rounded once; weights and biases are cast piece by piece, in
    `logits_of`.
    """
    tensors = (hidden, *(cluster.projection for cluster in clusters))
    hidden, *projections = widened(tensors, dtype or work_dtype(hidden.dtype))
    pairs = zip(projections, clusters, strict=True)
    return hidden, *(Cluster(wide, cluster.weight, cluster.bias) for wide, cluster in pairs)


def projected(hidden: Tensor, cluster: Cluster) -> Tensor:
    """Projected rows [N, d_k], from the results of `widened_rows`."""
    return hidden if cluster.projection is None else hidden @ cluster.projection.transpose(-1, -2)


def logits_of(x: Tensor, cluster: Cluster) -> Tensor:
    """[N, V_k] in x's dtype, from projected rows [N, d_k]."""
    logits = x @ cluster.weight.to(x.dtype).transpose(-1, -2)
    return logits if cluster.bias is None else logits + cluster.bias.to(x.dtype)


def pieces(cluster: Cluster) -> list[tuple[int, Cluster]]:
    """The cluster split along the vocabulary: each piece's first column, and the piece."""
    n_columns = cluster.weight.shape[0]
    size = max(_MIN_COLUMNS, -(-n_columns // _MAX_PIECES))
    # One split, not several slices: backward then concatenates the pieces' gradients once.
    weights = torch.split(cluster.weight, size)
    biases = [None] * len(weights) if cluster.bias is None else torch.split(cluster.bias, size)
    return [
        (n * size, Cluster(cluster.projection, weight, bias))
        for n, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    ]


def columns(cluster: Cluster, first: int, last: int | None) -> Cluster:
    """Columns first … last - 1 of a cluster's logits, as a cluster."""
    bias = None if cluster.bias is None else cluster.bias[first:last]
    return Cluster(cluster.projection, cluster.weight[first:last], bias)
