"""Sorts tokens by cluster on the device, and says which tile of them a program owns.

A stable counting sort into buffers of fixed size: the host learns no count, so nothing here waits
for the device or depends on the data, and a CUDA graph may replay it with other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.triton.launching import launch
from txl_kernels.torch_private import assert_async

_BLOCK = 512
_WARPS = 4


class Buckets(NamedTuple):
    """Tokens by cluster, in their own order within each.

    Behind the clusters' come the ignored ones, and last those out of range, which are left alone
    as if ignored.
    """

    order: Tensor  # [N] int32: which token stands at a sorted position
    column: Tensor  # [N] int32: its number within its cluster, by sorted position
    first: Tensor  # [n_clusters + 2] int32: position of each cluster's first, and of those two


@triton.jit
def cluster_of(token, firsts, V, ignore_index, N_CLUSTERS: tl.constexpr):
    """A token's cluster and its number there.

    The cluster is N_CLUSTERS where the token is ignored, N_CLUSTERS + 1 where it is out of range.
    """
    cluster = tl.zeros_like(token).to(tl.int32)
    column = token
    for k in tl.static_range(1, N_CLUSTERS):
        inside = token >= firsts[k]
        cluster = tl.where(inside, k, cluster)
        column = tl.where(inside, token - firsts[k], column)
    cluster = tl.where((token >= 0) & (token < V), cluster, N_CLUSTERS + 1)
    return tl.where(token == ignore_index, N_CLUSTERS, cluster), column.to(tl.int32)


@triton.jit
def _adaptive_buckets_kernel(
    p_token,  # [N] int64
    p_order,  # [N]
    p_column,  # [N]
    p_first,  # [N_CLUSTERS + 2]
    firsts,  # N_CLUSTERS numbers: each cluster's first token
    N,
    V,
    ignore_index,
    N_CLUSTERS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Places BLOCK tokens at their sorted positions.

    One program counts every cluster's tokens over the whole of p_token, those before its own block
    apart, and ranks its own by a running sum: no program waits for another, at the price of reading
    p_token once each (64 KiB for 8,192 tokens, from L2). Integers alone, so the same every time.
    """
    i_block = tl.program_id(0)
    o_k = tl.arange(0, PADDED)
    before = tl.zeros((PADDED,), tl.int32)
    count = tl.zeros((PADDED,), tl.int32)
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        token = tl.load(p_token + o_n, mask=o_n < N, other=ignore_index)
        cluster, _ = cluster_of(token, firsts, V, ignore_index, N_CLUSTERS)
        here = tl.sum(((cluster[:, None] == o_k[None, :]) & (o_n < N)[:, None]).to(tl.int32), 0)
        count += here
        before += tl.where(start < i_block * BLOCK, here, 0)
    first = tl.cumsum(count, 0) - count
    if i_block == 0:
        tl.store(p_first + o_k, first, mask=o_k < N_CLUSTERS + 2)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(p_token + o_n, mask=o_n < N, other=ignore_index)
    cluster, column = cluster_of(token, firsts, V, ignore_index, N_CLUSTERS)
    member = ((cluster[:, None] == o_k[None, :]) & (o_n < N)[:, None]).to(tl.int32)
    rank = tl.cumsum(member, 0) - member + (first + before)[None, :]
    position = tl.sum(rank * member, 1)
    tl.store(p_order + position, o_n, mask=o_n < N)
    tl.store(p_column + position, column, mask=o_n < N)


def sort_by_cluster(
    op: str,
    name: str,
    tokens: Tensor,  # [N] int64
    sizes: Sequence[int],
    ignore_index: int | None,
) -> Buckets:
    """Buckets of the tokens; `sizes` are each cluster's. None: no token may be ignored.

    Raises:
        IndexError: a token out of range, where Triton interprets; a GPU asserts, which the host
            learns later and does not wait for.
    """
    (N,) = tokens.shape
    n_clusters = len(sizes)
    order, column = tokens.new_empty(2, N, dtype=torch.int32)
    first = tokens.new_zeros(n_clusters + 2, dtype=torch.int32)
    if N > 0:
        launch(
            _adaptive_buckets_kernel,
            (triton.cdiv(N, _BLOCK),),
            tokens.contiguous(),
            order,
            column,
            first,
            first_tokens(sizes),
            N,
            sum(sizes),
            -1 if ignore_index is None else ignore_index,
            N_CLUSTERS=n_clusters,
            PADDED=triton.next_power_of_2(n_clusters + 2),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    within = first[-2 if ignore_index is None else -1] == N
    _check_range(within, f"{op}: {name} must be in [0, {sum(sizes)})")
    return Buckets(order, column, first)


def _check_range(holds: Tensor, message: str) -> None:
    if holds.device.type != "cpu":
        assert_async(holds, message)
    elif not holds:
        raise IndexError(message)


def first_tokens(sizes: Sequence[int]) -> tuple[int, ...]:
    """Each cluster's first token."""
    return tuple(sum(sizes[:k]) for k in range(len(sizes)))


def n_tiles(n_tokens: int, n_clusters: int, block: int) -> int:
    """As many tiles as tokens can need: each cluster's last one may be part empty."""
    return -(-n_tokens // block) + n_clusters


@triton.jit
def tile_of(i_tile, p_first, FIRST: tl.constexpr, N_CLUSTERS: tl.constexpr, BLOCK: tl.constexpr):
    """Which tokens tile i_tile holds, counted over clusters FIRST … N_CLUSTERS - 1.

    Returns the cluster (-1: no such tile, the program may leave), the tile's first sorted position
    and the position behind its cluster's last.
    """
    cluster = -1
    start = 0
    end = 0
    n_before = 0
    for k in tl.static_range(FIRST, N_CLUSTERS):
        first = tl.load(p_first + k)
        last = tl.load(p_first + k + 1)
        n_here = tl.cdiv(last - first, BLOCK)
        inside = (i_tile >= n_before) & (i_tile < n_before + n_here)
        cluster = tl.where(inside, k, cluster)
        start = tl.where(inside, first + (i_tile - n_before) * BLOCK, start)
        end = tl.where(inside, last, end)
        n_before += n_here
    return cluster, start, end
