"""rel_shift on every backend: exact values, gradients, bad input, torch's own tools."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_shift

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [  # leading sizes, Tq, R, n_keys, offset
    ((), 1, 1, None, None),
    ((2, 3), 5, 9, None, None),
    ((2,), 7, 3, 20, 4),
    ((1, 2, 3), 17, 40, 23, None),
    ((3,), 4, 6, 5, -2),
    ((3,), 4, 6, 5, 100),
    ((0,), 4, 6, None, None),
    ((2,), 3, 5, 0, None),
]
IDS = ["one", "square", "short", "conformer", "negative", "far", "empty", "no_keys"]


@pytest.fixture(params=["reference", "native"])
def backend(request, require_backend):
    require_backend("rel_shift", request.param, needs_grad=True)
    return request.param


def _loop(x, n_keys, offset):
    out = x.new_zeros(*x.shape[:-1], n_keys)
    for i in range(x.shape[-2]):
        for j in range(n_keys):
            if 0 <= j - i + offset < x.shape[-1]:
                out[..., i, j] = x[..., i, j - i + offset]
    return out


@pytest.mark.parametrize(("lead", "Tq", "R", "n_keys", "offset"), SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_formula_bit_by_bit(backend, dtype, lead, Tq, R, n_keys, offset):
    x = torch.randn(*lead, Tq, R).to(dtype).requires_grad_()
    out = rel_shift(x, n_keys=n_keys, offset=offset, backend=backend)
    due_x = x.detach().clone().requires_grad_()
    columns, row = R if n_keys is None else n_keys, Tq - 1 if offset is None else offset
    due = _loop(due_x, columns, row)
    dout = torch.randn(due.shape).to(dtype)
    assert out.dtype == dtype
    assert torch.equal(out, due)
    (dx,) = torch.autograd.grad(out, x, dout)
    expected = (
        torch.autograd.grad(due, due_x, dout)[0] if due.requires_grad else torch.zeros_like(x)
    )
    assert torch.equal(dx, expected)


def test_strides_do_not_matter(backend):
    x = torch.randn(6, 5, 8)
    for strided in (x.transpose(0, 1), x.transpose(1, 2), x[..., ::2], x[:1].expand(4, 5, 8)):
        due = rel_shift(strided.contiguous(), n_keys=7, backend=backend)
        assert torch.equal(rel_shift(strided, n_keys=7, backend=backend), due)


def test_an_expanded_gradient_counts_as_its_copy(backend):
    x = torch.randn(2, 5, 8, requires_grad=True)
    rel_shift(x, n_keys=6, backend=backend).sum().backward()
    ones = torch.ones(2, 5, 6)
    (due,) = torch.autograd.grad(rel_shift(x, n_keys=6, backend=backend), x, ones)
    assert torch.equal(x.grad, due)


def test_gradcheck(backend):
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rel_shift(x, n_keys=6, backend=backend), x)


def test_opcheck(require_backend):
    require_backend("rel_shift", "native")
    x = torch.randn(2, 4, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.txl_native.rel_shift_fwd.default, (x, 6, 3))
    dout = torch.randn(2, 4, 6)
    torch.library.opcheck(torch.ops.txl_native.rel_shift_bwd.default, (dout, 5, 3))


def test_second_derivative_of_a_kernel_raises(require_backend):
    require_backend("rel_shift", "native")
    x = torch.randn(4, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(rel_shift(x, backend="native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rel_shift: no second derivative"):
        dx.sum().backward()


def test_compiles_and_exports_with_dynamic_lengths(backend):
    class Shift(torch.nn.Module):
        def forward(self, x):
            return rel_shift(x, n_keys=x.shape[2] - x.shape[1] + 1, backend=backend)

    torch.compiler.reset()
    x = torch.randn(2, 4, 9)
    assert torch.equal(torch.compile(Shift(), fullgraph=True)(x), Shift()(x))
    Tq, R = torch.export.Dim("Tq", min=2, max=100), torch.export.Dim("R", min=200, max=900)
    program = torch.export.export(
        Shift(), (torch.randn(2, 4, 300),), dynamic_shapes=({1: Tq, 2: R},)
    )
    y = torch.randn(2, 7, 211)
    assert torch.equal(program.module()(y), Shift()(y))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(3)}, ValueError, r"x must have shape \[..., Tq, R\]"),
        ({"x": torch.zeros(3, 0)}, ValueError, "R ≥ 1, got"),
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "x must be torch.float32"),
        ({"n_keys": -1}, ValueError, "n_keys must be at least 0, got -1"),
        ({"n_keys": 2.0}, TypeError, "n_keys must be an integer"),
        ({"offset": "3"}, TypeError, "offset must be an integer"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_argument(call, error, message):
    with pytest.raises(error, match=f"rel_shift: {message}|rel_shift: .*{message}"):
        rel_shift(**{"x": torch.zeros(3, 4), **call})
