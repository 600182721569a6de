"""Adaptive softmax in plain PyTorch: tokens drawn from it.

The greatest of log p / temperature + Gumbel noise is a draw from p^(1 / temperature). Without
`top_k` and `top_p` it is found in one pass over pieces of the vocabulary. With one of them, all
tokens of a few rows at a time are sorted once.

Every function also returns a score per row that is finite exactly if the logits it read were: NaN
and +inf spread to it, and so does -inf in all of a cluster's logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from txl_kernels.backends.reference.adaptive_softmax import (
    Cluster,
    columns,
    log_prob,
    logits_of,
    pieces,
    projected,
    widened_rows,
)
from txl_kernels.transforms import inside_transform

_SORTED_LOGITS = 1 << 22  # logits of the rows sorted at once: 16 MiB in float32


@torch.no_grad()
def sample(
    hidden: Tensor,  # [N, d]
    head: Cluster,
    tails: Sequence[Cluster],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A token per row from the filtered p^(1 / temperature): int64 [N], and the scores [N]."""
    hidden, head, *tails = widened_rows(hidden, head, *tails)
    if top_k is None and top_p is None:
        if temperature == 1 and not inside_transform("vmap"):
            return _draw_by_level(hidden, head, tails, generator)
        return _draw_by_piece(hidden, head, tails, temperature, generator)
    n_tokens = head.weight.shape[0] - len(tails) + sum(tail.weight.shape[0] for tail in tails)
    drawn = []
    for rows in torch.split(hidden, max(1, _SORTED_LOGITS // n_tokens)):
        log_probs, tokens = log_prob(rows, head, tails).sort(1, descending=True)
        column, score = draw_sorted(log_probs[:, :top_k], temperature, top_k, top_p, generator)
        drawn.append((tokens.gather(1, column[:, None])[:, 0], score))
    tokens, scores = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return tokens, scores


def draw_sorted(
    log_probs: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """A column and a score per row of falling log-probabilities [N, C] of the top-k tokens."""
    tempered = (log_probs - log_probs[:, :1]) / temperature  # at most 0 at any temperature
    if top_p is not None:
        mass = tempered.softmax(1).cumsum(1)
        last = (mass[:, :-1] < top_p).sum(1, keepdim=True)  # column of the last token kept
        if top_k is None:  # equally probable tokens are kept together
            dropped = tempered < tempered.gather(1, last)
        else:
            dropped = torch.arange(tempered.shape[1], device=tempered.device) > last
        tempered = tempered.masked_fill(dropped, -torch.inf)
    return _race(tempered, generator)[1], log_probs[:, 0]


def _draw_by_piece(
    hidden: Tensor,
    head: Cluster,
    tails: Sequence[Cluster],
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """In one pass: log p is a logit plus a constant of its cluster, which is known at its end.

    The winner of each piece is found relative to the piece's greatest logit, so that no quotient
    by the temperature overflows; the winners are compared relative to the greatest log p.
    """
    c0 = head.weight.shape[0] - len(tails)
    logits = logits_of(projected(hidden, head), columns(head, c0, None))
    entry = logits.transpose(-1, -2)  # [n_tails, N]
    lses: list[Tensor] = []
    homes: list[int] = []  # the cluster of each piece
    won: list[tuple[Tensor, Tensor, Tensor]] = []  # per piece: greatest logit, goal, token; [N]
    for first_token, x, cluster in _token_clusters(hidden, head, tails):
        parts = []
        for first, piece in pieces(cluster):
            logits = logits_of(x, piece)
            parts.append(logits.logsumexp(1))
            greatest = logits.amax(1).clamp(min=torch.finfo(logits.dtype).min)
            goal, column = _race((logits - greatest[:, None]) / temperature, generator)
            won.append((greatest, goal, column + first_token + first))
            homes.append(len(lses))
        lses.append(torch.stack(parts).logsumexp(0))

    lse = torch.stack(lses)  # [n_clusters, N]
    head_lse = torch.cat([lse[:1], entry]).logsumexp(0)
    shifts = torch.cat([torch.zeros_like(lse[:1]), entry - lse[1:]]) - head_lse  # log p - logit
    greatest, goals, tokens = (torch.stack(parts) for parts in zip(*won, strict=True))
    log_probs = greatest + shifts[homes]  # [n_pieces, N]
    goals = goals + (log_probs - log_probs.amax(0)) / temperature
    score, winner = goals.max(0, keepdim=True)
    return tokens.gather(0, winner)[0], score[0]


def _draw_by_level(
    hidden: Tensor, head: Cluster, tails: Sequence[Cluster], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """At temperature 1: a column of the head, then a token of the cluster if the column is one's.

    Clusters that no row drew are not read. The host waits for the device once per tail.
    """
    c0 = head.weight.shape[0] - len(tails)
    column, score = _draw_column(hidden, head, generator)
    tokens, first_token = column.clone(), c0
    for k, tail in enumerate(tails):
        rows = (column == c0 + k).nonzero()[:, 0]
        if rows.numel():
            inside, goal = _draw_column(hidden[rows], tail, generator)
            tokens[rows] = first_token + inside
            score[rows] += goal
        first_token = first_token + tail.weight.shape[0]
    return tokens, score


def _draw_column(
    hidden: Tensor, cluster: Cluster, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """One draw per row from the softmax of a cluster's logits, and its goal: [N] each."""
    x = projected(hidden, cluster)
    runs = []
    for first, piece in pieces(cluster):
        goal, column = _race(logits_of(x, piece), generator)
        runs.append((goal, column + first))
    goals, found = (torch.stack(parts) for parts in zip(*runs, strict=True))  # [n_pieces, N]
    goal, winner = goals.max(0, keepdim=True)
    return found.gather(0, winner)[0], goal[0]


def _race(logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The greatest of each row of [N, C] with Gumbel noise, and its column: [N] each."""
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    goal, column = (logits - noise).max(1)
    return goal, column


def _token_clusters(
    hidden: Tensor, head: Cluster, tails: Sequence[Cluster]
) -> Iterator[tuple[int, Tensor, Cluster]]:
    """First token, projected rows and weights of each cluster; the head without its entries."""
    c0 = head.weight.shape[0] - len(tails)
    first_token = 0
    for cluster in (columns(head, 0, c0), *tails):
        yield first_token, projected(hidden, cluster), cluster
        first_token += cluster.weight.shape[0]
