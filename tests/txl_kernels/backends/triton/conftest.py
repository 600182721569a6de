"""What tests of the Triton kernels share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from txl_kernels.backends import triton as door
from txl_kernels.testing.poison import filled_with_nan


@pytest.fixture
def poison():
    """A context in which memory without a value holds NaN, or the largest integer."""
    return filled_with_nan


class Bounds:
    """The addresses that the tensors of the running launch cover, [begin, end) in bytes."""

    begins = ends = np.zeros(0, np.uint64)

    def cover(self, values):
        """What a launch is given; numbers are left out, overlapping tensors are one stretch.

        Rows of a matrix are as long as they are apart: kernels pad them, the last one too.
        """
        stretches = []
        for x in torch.utils._pytree.tree_leaves(values):
            if isinstance(x, torch.Tensor) and x.numel() > 0:
                n = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
                if x.dim() == 2 and x.stride(1) == 1:
                    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
                    n = min(n + max(x.stride(0) - x.shape[1], 0), room)
                stretches.append((x.data_ptr(), x.data_ptr() + n * x.element_size()))
        joined = []
        for begin, end in sorted(stretches):
            if joined and begin <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([begin, end])
        self.begins, self.ends = np.array(joined, np.uint64).reshape(-1, 2).T

    def check(self, pointers, mask):
        """Raises IndexError where one that the mask lets through lies outside all tensors."""
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        place = np.searchsorted(self.begins, addresses, side="right") - 1
        if np.any(place < 0) or np.any(addresses + size > self.ends[place]):
            raise IndexError("a kernel reads or writes outside its tensors")


@pytest.fixture(autouse=True)
def _every_access_is_inside(monkeypatch):
    """In the interpreter, which itself reads and writes wherever a pointer leads."""
    if not door.interprets():
        return
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    bounds = Bounds()
    launch = GridExecutor.__call__

    def bounded_launch(self, *args, **kwargs):
        bounds.cover([*args, *kwargs.values()])
        return launch(self, *args, **kwargs)

    def bounded(method, pointer, mask):
        def access(self, *args):
            bounds.check(args[pointer], args[mask])
            return method(self, *args)

        return access

    monkeypatch.setattr(GridExecutor, "__call__", bounded_launch)
    for name, pointer, mask in (
        ("create_masked_load", 0, 1),
        ("create_masked_store", 0, 2),
        ("create_atomic_rmw", 1, 3),
    ):
        access = bounded(getattr(InterpreterBuilder, name), pointer, mask)
        monkeypatch.setattr(InterpreterBuilder, name, access)
