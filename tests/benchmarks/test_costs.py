"""Cases of cost: both contenders run, ours has the yardstick's result, one thread is restored."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.cases import OURS, WrongResultError, costs
from benchmarks.cases.costs import Cache, Packing, SmallCall

CASES = [
    Packing("packing", "forward+backward", "alone", n_documents=3, length=11, H=2, D=8),
    Cache("cache", "forward", "cache-5", capacity=40, n_valid=5, H=2, D=8),
    SmallCall("small_call", "forward", "sdpa-causal", threads=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.shape)
def test_both_contenders_run(case):
    before = torch.get_num_threads()
    case.check(OURS)
    with case.contender(OURS) as ours, case.contender(case.yardstick) as other:
        assert torch.get_num_threads() == (case.threads or before)
        assert ours() > 0
        assert other() > 0
    assert torch.get_num_threads() == before


def test_sizes_are_those_of_the_target():
    sizes = {x.name: dataclasses.asdict(x) for x in costs.cost_cases()}
    packing = sizes["rel_attention/packing_16x512/float32/forward+backward"]
    assert (packing["n_documents"], packing["length"]) == (16, 512)
    cache = sizes["rel_attention/cache_4096/float32/forward"]
    assert (cache["capacity"], cache["n_valid"]) == (4096, 500)
    small = sizes["rel_attention/small_call/float32/forward"]
    assert (small["H"], small["T"], small["D"], small["threads"]) == (2, 16, 32, 1)


def test_a_wrong_result_is_found(monkeypatch):
    """Documents that attend to each other."""
    monkeypatch.setattr(
        costs, "packed_ranges", lambda edges, T: (torch.tensor([0]), torch.tensor([T]))
    )
    with pytest.raises(WrongResultError, match="packing/float32"):
        CASES[0].check(OURS)
