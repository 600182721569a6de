"""The interpreter's tests see a kernel that leaves its tensors, by one element too."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.interpreted

N = 20


@pytest.fixture
def copy():
    """Copies elements [first, N + beyond), in stores or in atomic additions."""
    triton = pytest.importorskip("triton")
    tl = pytest.importorskip("triton.language")

    @triton.jit
    def _copy_kernel(p_x, p_out, first, end_in, end_out, ADDS: tl.constexpr):
        o = tl.arange(0, 32) + first
        b_x = tl.load(p_x + o, mask=o < end_in, other=0.0)
        if ADDS:
            tl.atomic_add(p_out + o, b_x, mask=o < end_out)
        else:
            tl.store(p_out + o, b_x, mask=o < end_out)

    def run(*numbers, adds=False):
        x, out = torch.randn(N + 64), torch.zeros(N + 64)
        _copy_kernel[(1,)](x[32 : N + 32], out[32 : N + 32], *numbers, ADDS=adds)
        return x, out

    return run


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("rel_shift", "triton")


@pytest.mark.parametrize("adds", [False, True])
def test_what_is_inside_is_done(adds, copy):
    x, out = copy(0, N, N, adds=adds)
    assert torch.equal(out[32 : N + 32], x[32 : N + 32])
    assert out.count_nonzero() == N


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("numbers", [(0, N + 1, N), (0, N, N + 1), (-1, N, N)], ids=str)
def test_one_element_outside_is_reported(numbers, adds, copy):
    with pytest.raises(Exception, match="outside its tensors"):
        copy(*numbers, adds=adds)
