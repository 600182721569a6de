"""The cases under pytest-benchmark: `pytest benchmarks/`, one group per case.

For a look at one contender or at its history; ratios are `python -m benchmarks`' business, which
lets the contenders alternate.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import registry
from benchmarks.cases import OURS, PeerUnavailableError
from benchmarks.measure import WANTED_ROUNDS

CONTENDERS = [
    pytest.param(case, name, id=f"{case.name}/{name}")
    for case in registry.runnable(registry.timed_cases())
    for name in (OURS, *case.peers, *case.yardsticks)
]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "name"), CONTENDERS)
def test_speed(case, name, benchmark):
    benchmark.group = case.name
    try:
        case.check(name)
        with case.contender(name) as run:
            benchmark.pedantic(run, rounds=WANTED_ROUNDS, warmup_rounds=2)
    except PeerUnavailableError as error:
        pytest.skip(str(error))
    if case.flop is not None:
        benchmark.extra_info["gflops"] = case.flop / benchmark.stats["median"] / 1e9
    if case.tokens is not None:
        benchmark.extra_info["tokens_per_second"] = case.tokens / benchmark.stats["median"]
