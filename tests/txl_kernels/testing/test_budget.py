"""The error budget passes what is as good as eager PyTorch and refuses what is not."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.testing import check_budget


def test_the_eager_result_itself_passes():
    ref64 = torch.randn(50, dtype=torch.float64)
    eager = ref64.bfloat16()
    check_budget("x", eager, ref64, eager, dtype=torch.bfloat16)


@pytest.mark.parametrize("is_sum", [False, True])
def test_an_error_of_ten_roundings_fails(is_sum):
    ref64 = torch.linspace(-1, 1, 50, dtype=torch.float64)
    wrong = ref64 + 10 * torch.finfo(torch.float32).eps
    with pytest.raises(AssertionError, match="x: error"):
        check_budget("x", wrong, ref64, ref64.float(), dtype=torch.float32, is_sum=is_sum)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_fails(value):
    ref64 = torch.ones(3, dtype=torch.float64)
    wrong = ref64.clone()
    wrong[1] = value
    with pytest.raises(AssertionError):
        check_budget("x", wrong, ref64, ref64, dtype=torch.float32)


def test_infinite_elements_must_agree():
    ref64 = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    check_budget("lse", ref64.float(), ref64, ref64.float(), dtype=torch.float32)
    with pytest.raises(AssertionError, match="infinite"):
        check_budget("lse", torch.tensor([1.0, 2.0]), ref64, ref64.float(), dtype=torch.float32)


def test_a_gradient_that_cancels_to_zero_has_its_magnitude_as_slack():
    zero = torch.zeros(4, dtype=torch.float64)
    check_budget("dq", zero + 1e-7, zero, zero, dtype=torch.float32, magnitude=1.0)
    with pytest.raises(AssertionError):
        check_budget("dq", zero + 1e-6, zero, zero, dtype=torch.float32, magnitude=1.0)
