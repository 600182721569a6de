"""The Triton adaptive embedding against the reference in float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from txl_kernels import adaptive_embedding
from txl_kernels.testing import check_budget

pytestmark = pytest.mark.interpreted

SIZES = (10, 15, 25)
WIDTHS = {"projected": (12, 6, 3), "first_bare": (12, 6, 3), "bare": (12, 12, 12)}


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("adaptive_embedding", "triton", needs_grad=True)


def _weights(dtype, kind="projected", sizes=SIZES, widths=None, d=12):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        return x.to(dtype).requires_grad_()

    widths = WIDTHS[kind] if widths is None else widths
    bare = {"projected": 0, "first_bare": 1, "bare": len(sizes)}[kind]
    tables = [normal(*shape) for shape in zip(sizes, widths, strict=True)]
    return tables, [None if k < bare else normal(d, width) for k, width in enumerate(widths)]


def _run(tokens, weights, backend="triton", sparse=False):
    tables, projections = weights
    cutoffs = [sum(len(x) for x in tables[:k]) for k in range(1, len(tables))]
    out = adaptive_embedding(
        tokens, tables, projections, cutoffs, 2.5, sparse=sparse, backend=backend
    )
    return _with_gradients(out, weights)


def _with_gradients(out, weights):
    tables, projections = weights
    leaves = [*tables, *(x for x in projections if x is not None)]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, dout)
    assert all(grad.layout == torch.strided for grad in grads[len(tables) :])
    return [out.detach(), *(grad.to_dense() for grad in grads)]


def _eager(tokens, weights):
    """Each cluster's rows by index, in the inputs' own dtype, intermediates rounded."""
    tables, projections = weights
    out, first = 0, 0
    for table, projection in zip(tables, projections, strict=True):
        inside = (tokens >= first) & (tokens < first + len(table))
        rows = torch.nn.functional.embedding((tokens - first).where(inside, 0), table)
        rows = rows if projection is None else rows @ projection.T
        out = out + torch.where(inside[..., None], rows, 0.0)
        first += len(table)
    return _with_gradients(2.5 * out, weights)


def _check(tokens, weights, **options):
    dtype = weights[0][0].dtype
    exact = tuple(
        [None if x is None else x.detach().double().requires_grad_() for x in xs] for xs in weights
    )
    actual = _run(tokens, weights, **options)
    eager, due = _eager(tokens, weights), _eager(tokens, exact)
    check_budget("out", actual[0], due[0], eager[0], dtype=dtype)
    largest = 2.5 * max(float(x.detach().abs().max()) for xs in exact for x in xs if x is not None)
    for n, tensors in enumerate(zip(actual[1:], due[1:], eager[1:], strict=True)):
        grad = f"gradient {n}"
        check_budget(grad, *tensors, dtype=dtype, magnitude=3 * largest, is_sum=True)


@pytest.mark.parametrize("shape", [(1,), (3, 31)], ids=str)
@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_rows_and_gradients_are_within_the_error_budget(shape, kind, dtype, sparse):
    tokens = torch.randint(0, sum(SIZES), shape, generator=torch.Generator().manual_seed(2))
    _check(tokens, _weights(dtype, kind), sparse=sparse)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("first", "end"), [(0, 10), (25, 50), (10, 25)], ids=str)
def test_tables_without_tokens(first, end, sparse):
    tokens = torch.randint(first, end, (33,), generator=torch.Generator().manual_seed(2))
    _check(tokens, _weights(torch.float32), sparse=sparse)


@pytest.mark.parametrize("tokens", [[9], [0, 1, 1, 8, 9, 2, 2]], ids=str)
def test_ten_tokens(tokens):
    weights = _weights(torch.float32, sizes=(1, 1, 7, 1), widths=(12, 6, 3, 1))
    _check(torch.tensor(tokens), weights)


def test_a_frequent_token_s_rows_are_added_in_float32():
    tokens = torch.zeros(400, dtype=torch.int64)
    tokens[::50] = 49
    _check(tokens, _weights(torch.float16, "bare"))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_what_memory_held_before_and_the_order_of_programs_do_not_matter(
    sparse, poison, monkeypatch
):
    from triton.runtime import interpreter

    tokens = torch.randint(0, 25, (90,), generator=torch.Generator().manual_seed(2))
    first = _run(tokens, _weights(torch.float32), sparse=sparse)
    builder = interpreter.interpreter_builder
    set_index = builder.set_grid_idx

    def backwards(*index):
        set_index(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    with poison():
        again = _run(tokens, _weights(torch.float32), sparse=sparse)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_no_tokens(sparse):
    out, *grads = _run(torch.empty(2, 0, dtype=torch.int64), _weights(torch.float32), sparse=sparse)
    assert out.shape == (2, 0, 12)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("wrong", [-1, 50])
def test_a_token_out_of_range(wrong):
    with pytest.raises(IndexError, match=r"tokens must be in \[0, 50\)"):
        _run(torch.tensor([3, wrong, 4]), _weights(torch.float32))


def test_compiles_as_one_graph():
    torch.compiler.reset()
    tables, projections = weights = _weights(torch.float32)
    tokens = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(
        lambda x: adaptive_embedding(x, tables, projections, (10, 25), 2.5, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    actual, due = _with_gradients(compiled(tokens), weights), _run(tokens, weights)
    for a, b in zip(actual, due, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(1, 60),
    st.booleans(),
)
def test_any_shape(sizes, d, N, sparse):
    tokens = torch.randint(0, sum(sizes), (N,), generator=torch.Generator().manual_seed(2))
    widths = [max(1, d // 2**k) for k in range(len(sizes))]
    _check(tokens, _weights(torch.float32, "projected", sizes, widths, d), sparse=sparse)
