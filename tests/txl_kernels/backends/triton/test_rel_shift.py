"""rel_shift in Triton's interpreter: every element, its gradient, any strides."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_shift

pytestmark = pytest.mark.interpreted

SHAPES = [  # leading sizes, Tq, R, n_keys, offset
    ((), 1, 1, None, None),
    ((2, 3), 5, 9, None, None),
    ((2,), 7, 3, 20, 4),
    ((1, 2, 3), 17, 40, 23, None),
    ((3,), 4, 6, 5, -2),
    ((3,), 4, 6, 5, 2**60),
    ((0,), 4, 6, None, None),
    ((2,), 3, 5, 0, None),
    ((2,), 5, 700, 600, 90),
]


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("rel_shift", "triton", needs_grad=True)


@pytest.mark.parametrize(("lead", "Tq", "R", "n_keys", "offset"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_is_the_reference_bit_by_bit(dtype, lead, Tq, R, n_keys, offset):
    x = torch.randn(*lead, Tq, R).to(dtype).requires_grad_()
    out, due = (
        rel_shift(x, n_keys=n_keys, offset=offset, backend=backend)
        for backend in ("triton", "reference")
    )
    assert out.dtype == dtype
    assert torch.equal(out, due)
    dout = torch.randn_like(due)
    (dx,), (due_dx,) = (torch.autograd.grad(result, x, dout) for result in (out, due))
    assert torch.equal(dx, due_dx)


def test_strides_do_not_matter():
    x = torch.randn(6, 5, 8)
    for strided in (x.transpose(0, 1), x.transpose(1, 2), x[..., ::2], x[:1].expand(4, 5, 8)):
        due = rel_shift(strided, n_keys=7, backend="reference")
        assert torch.equal(rel_shift(strided, n_keys=7, backend="triton"), due)


def test_an_expanded_gradient_counts_as_its_copy():
    x = torch.randn(2, 5, 8, requires_grad=True)
    grads = [
        torch.autograd.grad(rel_shift(x, n_keys=6, backend=backend).sum(), x)[0]
        for backend in ("triton", "reference")
    ]
    assert torch.equal(*grads)


def test_second_derivative_raises():
    x = torch.randn(4, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(rel_shift(x, backend="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rel_shift: no second derivative"):
        dx.sum().backward()
