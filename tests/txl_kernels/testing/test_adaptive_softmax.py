"""The checks of the adaptive softmax and embedding find wrong results and unequal runs."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.testing import ADAPTIVE_SOFTMAX_CASES as CASES
from txl_kernels.testing import adaptive_softmax as check
from txl_kernels.testing import comparison

CASE = CASES[0]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_within_the_budget(case, dtype):
    inputs = case.inputs(dtype)
    check.check_adaptive_softmax("adaptive_loss", inputs, case.cutoffs, "reference", runs=2)
    check.check_adaptive_embedding(inputs, case.cutoffs, "reference", runs=2)


@pytest.mark.parametrize("op", ["adaptive_loss", "adaptive_nll", "adaptive_embedding"])
def test_errors_and_other_bits_are_found(op, monkeypatch):
    right = getattr(comparison, op)
    factors = iter([1.01, 1.0, 1.0 + 1e-6])
    monkeypatch.setattr(
        comparison, op, lambda *args, **options: right(*args, **options) * next(factors)
    )

    def checked(runs):
        inputs = CASE.inputs(torch.float32)
        if op == "adaptive_embedding":
            check.check_adaptive_embedding(inputs, CASE.cutoffs, "reference", runs=runs)
        else:
            check.check_adaptive_softmax(op, inputs, CASE.cutoffs, "reference", runs=runs)

    with pytest.raises(AssertionError, match="over the budget"):
        checked(runs=1)
    with pytest.raises(AssertionError, match="two runs differ in the bits of out"):
        checked(runs=2)
