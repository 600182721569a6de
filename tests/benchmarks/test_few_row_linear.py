"""The linear layers of a decoding step: both contenders multiply, and wrong results are found."""

from __future__ import annotations

import pytest

from benchmarks import registry
from benchmarks.cases import OURS, WrongResultError, few_row_linear
from benchmarks.cases.few_row_linear import TORCH

CASES = [case.tiny() for case in registry.linear_cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_contenders_multiply_all_layers(case):
    assert case.layers > 1
    for name in (OURS, TORCH):
        case.check(name)
        with case.contender(name) as run:
            assert run() > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_result_is_found(case, monkeypatch):
    multiply = few_row_linear.few_row_linear
    monkeypatch.setattr(
        few_row_linear, "few_row_linear", lambda *args, **options: multiply(*args, **options) * 1.1
    )
    with pytest.raises(WrongResultError, match="ours is off"):
        case.check(OURS)
