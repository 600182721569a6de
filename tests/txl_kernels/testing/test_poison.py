"""Memory without a value is NaN in Python and in C++, and only within the context."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.testing.poison import filled_with_nan


@pytest.mark.parametrize("deterministic", [None, False, True])
def test_new_tensors_hold_nan_in_python(deterministic):
    x, before = torch.zeros(3), torch.empty
    with filled_with_nan(deterministic=deterministic):
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(x).isnan().all()
        assert x.new_empty(2, 2).isnan().all()
        assert x.new_empty(2, dtype=torch.int32).eq(2**31 - 1).all()
    assert torch.empty is before


def test_torch_fills_the_tensors_that_cpp_allocates_under_deterministic_algorithms():
    empty = torch.ops.aten.empty.memory_format
    with filled_with_nan(deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert empty([3]).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
