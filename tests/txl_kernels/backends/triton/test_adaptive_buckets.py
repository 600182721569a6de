"""The counting sort by cluster against torch's stable sort."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("adaptive_nll", "triton", needs_grad=True)


@pytest.mark.parametrize("N", [0, 1, 511, 512, 513, 2000])
@pytest.mark.parametrize("sizes", [(7,), (10, 15, 25), (1, 1, 1, 1, 1, 1, 1, 300)], ids=str)
def test_is_a_stable_sort_by_cluster(N, sizes):
    from txl_kernels.backends.triton.adaptive_buckets import first_tokens, sort_by_cluster

    target = torch.randint(0, sum(sizes), (N,), generator=torch.Generator().manual_seed(1))
    target[::7] = -100
    buckets = sort_by_cluster("op", "target", target, sizes, -100)
    firsts = torch.tensor(first_tokens(sizes))
    cluster = torch.searchsorted(firsts, target, right=True) - 1
    cluster[target == -100] = len(sizes)
    order = torch.sort(cluster, stable=True).indices
    assert torch.equal(buckets.order.long(), order)
    counts = torch.bincount(cluster, minlength=len(sizes) + 1)
    assert buckets.first.tolist() == [0, *counts.cumsum(0).tolist()]
    n = N - int(counts[-1])
    column = target[order][:n] - firsts[cluster[order][:n]]
    assert torch.equal(buckets.column.long()[:n], column)


@pytest.mark.parametrize("wrong", [-1, 50])
@pytest.mark.parametrize("ignore_index", [-100, None])
def test_a_token_out_of_range_is_named(wrong, ignore_index):
    from txl_kernels.backends.triton.adaptive_buckets import sort_by_cluster

    tokens = torch.tensor([3, wrong, 4])
    with pytest.raises(IndexError, match=r"op: tokens must be in \[0, 50\)"):
        sort_by_cluster("op", "tokens", tokens, (10, 40), ignore_index)
