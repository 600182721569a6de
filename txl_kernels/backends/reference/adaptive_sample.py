"""Sampling from the adaptive softmax in plain PyTorch, a piece of the vocabulary at a time.

The argmax of logit / temperature + Gumbel noise is a draw from the softmax, and can be computed
piece by piece. Within a cluster log p is the logit plus a constant. One pass computes the maximum
of each piece and that constant; the maxima are compared at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from txl_kernels.backends.reference.adaptive_softmax import (
    Cluster,
    columns,
    logits_of,
    pieces,
    projected,
    widened_rows,
)
from txl_kernels.transforms import inside_transform

N_CANDIDATES = 8


class Drawn(NamedTuple):
    """Independent draws, and properties of the distribution from the same pass."""

    tokens: Tensor  # [N, J] int64
    log_probs: Tensor  # [N, J]: log p of each, at temperature 1
    shifts: Tensor  # [n_clusters, N]: log p - logit
    total: Tensor  # [N]: log of the sum of p^(1 / temperature)


@torch.no_grad()
def sample(
    hidden: Tensor,  # [N, d]
    head: Cluster,
    tails: Sequence[Cluster],
    temperature: float,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """A token per row from p^(1 / temperature), int64 [N].

    With `top_p` from the smallest set of tokens whose probabilities sum to at least `top_p`:
    candidates are drawn from the whole distribution until one is in that set, on average in at
    most 1 / (1 - (1 - top_p)^8) rounds.
    """
    if hidden.is_meta:
        return hidden.new_empty(hidden.shape[0], dtype=torch.int64)
    hidden, head, *tails = widened_rows(hidden, head, *tails)
    if top_p is None and temperature == 1 and not inside_transform("vmap"):
        return _draw_by_level(hidden, head, tails, generator)
    if top_p is None:
        return draw(hidden, head, tails, temperature, 1, generator).tokens[:, 0]
    tokens = torch.full((hidden.shape[0],), -1, device=hidden.device)
    while (left := (tokens < 0).nonzero()[:, 0]).numel():
        rows = hidden[left]
        drawn = draw(rows, head, tails, temperature, N_CANDIDATES, generator)
        allowed = mass_before(rows, head, tails, temperature, drawn) < top_p
        found, first = allowed.int().max(1, keepdim=True)
        tokens[left] = drawn.tokens.gather(1, first).where(found > 0, -1)[:, 0]
    return tokens


def draw(
    hidden: Tensor,
    head: Cluster,
    tails: Sequence[Cluster],
    temperature: float,
    n_draws: int,
    generator: torch.Generator | None,
) -> Drawn:
    """`n_draws` tokens per row, independent of each other."""
    c0 = head.weight.shape[0] - len(tails)
    entry = logits_of(projected(hidden, head), columns(head, c0, None))  # [N, n_tails]
    lses: list[Tensor] = []
    homes: list[int] = []  # the cluster of each piece
    found: list[tuple[Tensor, Tensor, Tensor]] = []  # its maxima: with noise, logit, token
    for first_token, x, cluster in _token_clusters(hidden, head, tails):
        parts = []
        for first, piece in pieces(cluster):
            logits = logits_of(x, piece)
            tempered = logits / temperature
            parts.append(torch.stack([logits.logsumexp(1), tempered.logsumexp(1)]))
            goal, column = _race(tempered, n_draws, generator)
            found.append((goal, logits.gather(1, column), column + first_token + first))
            homes.append(len(lses))
        lses.append(torch.stack(parts).logsumexp(0))  # [2, N]: plain, tempered

    lse, tempered_lse = torch.stack(lses, dim=1)  # [n_clusters, N] each
    head_lse = torch.cat([lse[:1], entry.transpose(-1, -2)]).logsumexp(0)
    shifts = torch.cat([torch.zeros_like(lse[:1]), entry.transpose(-1, -2) - lse[1:]]) - head_lse
    total = (tempered_lse + shifts / temperature).logsumexp(0)

    goals, best_logits, tokens = (torch.stack(parts) for parts in zip(*found, strict=True))
    shift = shifts[homes][..., None]  # [n_pieces, N, 1]
    winner = (goals + shift / temperature).argmax(0, keepdim=True)  # [1, N, J]
    log_probs = (best_logits + shift).gather(0, winner)[0]
    return Drawn(tokens.gather(0, winner)[0], log_probs, shifts, total)


def mass_before(
    hidden: Tensor, head: Cluster, tails: Sequence[Cluster], temperature: float, drawn: Drawn
) -> Tensor:
    """[N, J]: the share of p^(1 / temperature) of the tokens more probable than each draw."""
    mass = torch.zeros_like(drawn.log_probs)
    clusters = _token_clusters(hidden, head, tails)
    for shift, (_, x, cluster) in zip(drawn.shifts, clusters, strict=True):
        for _, piece in pieces(cluster):
            log_probs = logits_of(x, piece) + shift[:, None]  # the same bits as in `draw`
            probs = (log_probs / temperature - drawn.total[:, None]).exp()
            likelier = [log_probs > least[:, None] for least in drawn.log_probs.unbind(1)]
            mass += torch.stack([(probs * ahead).sum(1) for ahead in likelier], 1)
    return mass


def _draw_by_level(
    hidden: Tensor, head: Cluster, tails: Sequence[Cluster], generator: torch.Generator | None
) -> Tensor:
    """At temperature 1: draws a column of the head, then a token of the cluster it stands for.

    Clusters that no row drew are not read; the host waits once for each cluster's rows.
    """
    c0 = head.weight.shape[0] - len(tails)
    column = _draw_column(hidden, head, generator)
    tokens, first_token = column.clone(), c0
    for k, tail in enumerate(tails):
        rows = (column == c0 + k).nonzero()[:, 0]
        if rows.numel():
            tokens[rows] = first_token + _draw_column(hidden[rows], tail, generator)
        first_token = first_token + tail.weight.shape[0]
    return tokens


def _draw_column(hidden: Tensor, cluster: Cluster, generator: torch.Generator | None) -> Tensor:
    """One draw per row from the softmax of a cluster's logits: [N]."""
    x = projected(hidden, cluster)
    runs = []
    for first, piece in pieces(cluster):
        goal, column = _race(logits_of(x, piece), 1, generator)
        runs.append((goal, column + first))
    goals, found = (torch.cat(parts, dim=1) for parts in zip(*runs, strict=True))
    return found.gather(1, goals.argmax(1, keepdim=True))[:, 0]


def _race(logits: Tensor, n_draws: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Each row's maximum of [N, C] plus Gumbel noise, and its column: [N, n_draws] each."""

    def run() -> tuple[Tensor, Tensor]:
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        return (logits - noise).max(1, keepdim=True)

    goals, found = zip(*(run() for _ in range(n_draws)), strict=True)
    return torch.cat(goals, dim=1), torch.cat(found, dim=1)


def _token_clusters(
    hidden: Tensor, head: Cluster, tails: Sequence[Cluster]
) -> Iterator[tuple[int, Tensor, Cluster]]:
    """First token, projected rows and weights of each cluster; the head without its entries."""
    c0 = head.weight.shape[0] - len(tails)
    first_token = 0
    for cluster in (columns(head, 0, c0), *tails):
        yield first_token, projected(hidden, cluster), cluster
        first_token = first_token + cluster.weight.shape[0]
