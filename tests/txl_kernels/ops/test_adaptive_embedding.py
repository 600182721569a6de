"""Adaptive embedding against row by row look-up, its gradients and torch's tools."""

from __future__ import annotations

import functools

import pytest
import torch

from txl_kernels import adaptive_embedding
from txl_kernels.testing import check_budget

V, CUTOFFS = 50, (10, 25)


def _weights(dtype=torch.float64, d=8, divide=2):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    sizes, widths = (10, 15, 25), [d // divide**k for k in range(3)]
    tables = [normal(n, width).requires_grad_() for n, width in zip(sizes, widths, strict=True)]
    projections = [normal(d, width).requires_grad_() for width in widths]
    return tables, projections


def _row_by_row(tokens, tables, projections, scale):
    rows, first = [], (0, *CUTOFFS)
    for token in tokens.flatten().tolist():
        k = sum(token >= cutoff for cutoff in CUTOFFS)
        row = tables[k][token - first[k]]
        rows.append(scale * (row if projections[k] is None else projections[k] @ row))
    return torch.stack(rows).reshape(*tokens.shape, -1)


@pytest.fixture(params=["reference", "native"])
def embed(request, require_backend):
    require_backend("adaptive_embedding", request.param, needs_grad=True)
    return functools.partial(adaptive_embedding, backend=request.param)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 11), (2, 3, 4)])
def test_is_the_projected_row_of_each_token(embed, shape):
    tokens = torch.randint(0, V, shape)
    weights = _weights()
    actual = embed(tokens, *weights, CUTOFFS, 2.5)
    due = _row_by_row(tokens, *weights, 2.5)
    torch.testing.assert_close(actual, due)
    dout, leaves = torch.randn_like(due), [*weights[0], *weights[1]]
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, dout),
        torch.autograd.grad(due, leaves, dout, allow_unused=True, materialize_grads=True),
    )


def test_without_projections_and_cutoffs_it_is_an_embedding(embed):
    table, tokens = torch.randn(V, 6), torch.randint(0, V, (4, 5))
    due = 3 * torch.nn.functional.embedding(tokens, table)
    torch.testing.assert_close(embed(tokens, [table], [None], scale=3.0), due)


def test_a_table_may_stand_unprojected_beside_projected_ones(embed):
    tables, (_, *projections) = _weights()
    tokens = torch.arange(V)
    actual = embed(tokens, tables, [None, *projections], CUTOFFS)
    torch.testing.assert_close(actual, _row_by_row(tokens, tables, [None, *projections], 1.0))


def test_tables_without_tokens_get_a_zero_gradient(embed):
    tables, projections = _weights()
    embed(torch.arange(25), tables, projections, CUTOFFS).sum().backward()
    assert not tables[2].grad.any()
    assert not projections[2].grad.any()
    assert tables[1].grad.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_float32(embed, dtype):
    tables, projections = _weights(dtype)
    exact = [x.double() for x in tables], [x.double() for x in projections]
    tokens = torch.arange(V)
    actual = embed(tokens, tables, projections, CUTOFFS, 4.0)
    due = embed(tokens, *exact, CUTOFFS, 4.0)
    assert actual.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), due, rtol=rounding, atol=8 * rounding)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_empty_tokens(embed, sparse):
    tables, projections = leaves = _weights()
    tokens = torch.empty(2, 0, dtype=torch.int64)
    out = embed(tokens, tables, projections, CUTOFFS, sparse=sparse)
    assert out.shape == (2, 0, 8)
    out.sum().backward()
    assert not any(x.grad.to_dense().any() for weights in leaves for x in weights)


@pytest.mark.parametrize("N", [1, 255, 257])
def test_ragged_token_counts(embed, N):
    tokens = torch.randint(0, V, (N,))
    weights = _weights()
    due = _row_by_row(tokens, *weights, 1.0)
    torch.testing.assert_close(embed(tokens, *weights, CUTOFFS), due)


def test_gradcheck(embed):
    tables, projections = _weights()
    tokens = torch.randint(0, V, (6,))
    assert torch.autograd.gradcheck(
        lambda *x: embed(tokens, x[:3], x[3:], CUTOFFS, 2.0),
        (*tables, *projections),
        fast_mode=True,
    )


def test_compiles_and_exports_with_dynamic_lengths(embed):
    class Embedding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            tables, projections = _weights(torch.float32)
            self.tables = torch.nn.ParameterList(tables)
            self.projections = torch.nn.ParameterList(projections)

        def forward(self, tokens):
            return embed(tokens, list(self.tables), list(self.projections), CUTOFFS)

    torch.compiler.reset()
    module, tokens = Embedding(), torch.randint(0, V, (2, 9))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), module(tokens))
    T = torch.export.Dim("T", min=2, max=1000)
    program = torch.export.export(module, (tokens,), dynamic_shapes=({1: T},))
    tokens = torch.randint(0, V, (2, 31))
    torch.testing.assert_close(program.module()(tokens), module(tokens))


def test_autocast_gives_its_dtype(embed):
    tables, projections = _weights(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = embed(torch.arange(V), tables, projections, CUTOFFS)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("projected", [True, False], ids=["projected", "plain"])
def test_sparse_gradients_are_the_dense_ones(embed, projected):
    tables, projections = _weights(d=8, divide=2 if projected else 1)
    projections = projections if projected else [None] * 3
    tokens = torch.tensor([[3, 30, 3], [12, 49, 30]])
    dense, sparse = (
        torch.autograd.grad(
            embed(tokens, tables, projections, CUTOFFS, 2.0, sparse=flag).square().sum(), tables
        )
        for flag in (False, True)
    )
    for grad, due in zip(sparse, dense, strict=True):
        assert grad.is_sparse
        torch.testing.assert_close(grad.to_dense(), due)


def test_native_sparse_gradients_name_each_row_once(require_backend):
    require_backend("adaptive_embedding", "native")
    tables, projections = _weights()
    tokens = torch.tensor([49, 30, 30, 26, 49, 3])
    out = adaptive_embedding(tokens, tables, projections, CUTOFFS, sparse=True, backend="native")
    out.sum().backward()
    assert [t.grad._indices()[0].tolist() for t in tables] == [[3], [], [1, 5, 24]]
    torch.optim.SparseAdam(tables).step()


def test_sparse_gradients_under_a_compiler_raise():
    tables, projections = _weights()
    compiled = torch.compile(
        lambda tokens: adaptive_embedding(tokens, tables, projections, CUTOFFS, sparse=True),
        backend="eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="sparse gradients exist in eager mode only"):
        compiled(torch.arange(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_within_the_error_budget(embed, dtype):
    tables, projections = _weights(dtype)
    tokens = torch.randint(0, V, (200,), generator=torch.Generator().manual_seed(1))
    dout = torch.randn(200, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    leaves = [*tables, *projections]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    grads, eager, due = (
        torch.autograd.grad(call(tokens, x[:3], x[3:]), x, dout.to(x[0].dtype))
        for call, x in (
            (lambda *args: embed(*args, CUTOFFS, 2.0), leaves),
            (lambda *args: _row_by_row(*args, 2.0), leaves),
            (lambda *args: _row_by_row(*args, 2.0), exact),
        )
    )
    largest = 2.0 * float(dout.abs().max()) * max(float(x.detach().abs().max()) for x in leaves)
    for n, results in enumerate(zip(grads, due, eager, strict=True)):
        check_budget(f"gradient {n}", *results, dtype=dtype, magnitude=largest, is_sum=True)


def _large(dtype):
    """Several panels, tiles and depths of products, none of them whole."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    sizes, widths, d = (1400, 90, 40), (150, 37, 5), 210
    tables = [normal(n, width) for n, width in zip(sizes, widths, strict=True)]
    projections = [normal(d, width) for width in widths]
    tokens = torch.randint(0, sum(sizes), (1500,), generator=generator)
    tokens[:300] = torch.randint(0, 3, (300,), generator=generator)
    dout = torch.randn(1500, d, generator=generator).to(dtype)
    return tokens, tables, projections, (1400, 1490), dout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_large_products_are_within_the_error_budget(require_backend, dtype):
    require_backend("adaptive_embedding", "native", needs_grad=True)
    tokens, tables, projections, cutoffs, dout = _large(dtype)

    def run(backend, like):
        leaves = [x.detach().to(like).requires_grad_() for x in (*tables, *projections)]
        out = adaptive_embedding(tokens, leaves[:3], leaves[3:], cutoffs, 2.0, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, dout.to(like))]

    actual = run("native", dtype)
    due, eager = run("reference", torch.float64), run("reference", dtype)
    for n, results in enumerate(zip(actual, due, eager, strict=True)):
        usual = float(results[1].detach().square().mean().sqrt())  # of rows that few tokens name
        check_budget(f"result {n}", *results, dtype=dtype, magnitude=usual, is_sum=True)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(require_backend, dtype, sparse):
    require_backend("adaptive_embedding", "native", needs_grad=True)
    tokens, tables, projections, cutoffs, dout = _large(dtype)
    leaves, threads, runs = [*tables, *projections], torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = adaptive_embedding(
                tokens, tables, projections, cutoffs, sparse=sparse, backend="native"
            )
            runs.append([out, *(x.to_dense() for x in torch.autograd.grad(out, leaves, dout))])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


def test_a_large_tables_gradient_is_a_tensor_like_any_other(require_backend):
    require_backend("adaptive_embedding", "native", needs_grad=True)
    table = torch.randn(50_000, 48, requires_grad=True)  # 9 MiB
    tokens = torch.tensor([0, 7, 49_999, 7])
    adaptive_embedding(tokens, [table], [None], backend="native").sum().backward()
    due = torch.zeros_like(table)
    due[[0, 49_999]], due[7] = 1.0, 2.0
    assert torch.equal(table.grad, due)
    assert torch.equal(table.grad.mul_(3.0).add_(1.0), 3 * due + 1)
    table.grad.untyped_storage().resize_(0)  # what fully sharded training does to free one


def test_opcheck(require_backend):
    require_backend("adaptive_embedding", "native", needs_grad=True)
    tables, projections = _weights(torch.float32)
    tokens = torch.randint(0, V, (3, 4))
    call = (tokens, tables, projections, 2.0)
    torch.library.opcheck(torch.ops.txl_native.adaptive_embedding_fwd.default, (*call, False))
    tables, projections = ([x.detach() for x in weights] for weights in (tables, projections))
    for sparse, wanted in ((False, [True] * 6), (True, [True] * 6), (False, [True, False] * 3)):
        torch.library.opcheck(
            torch.ops.txl_native.adaptive_embedding_bwd.default,
            (torch.randn(3, 4, 8), tokens, tables, projections, 2.0, sparse, wanted),
        )


def test_second_derivative_of_a_kernel_raises(require_backend):
    require_backend("adaptive_embedding", "native", needs_grad=True)
    tables, projections = _weights()
    out = adaptive_embedding(torch.arange(V), tables, projections, CUTOFFS, backend="native")
    (grad,) = torch.autograd.grad(out.square().sum(), tables[0], create_graph=True)
    with pytest.raises(RuntimeError, match="adaptive_embedding: no second derivative"):
        grad.sum().backward()


TABLES, PROJECTIONS = _weights(torch.float32)
BAD = [
    ({"tokens": [1, 2]}, TypeError, "tokens must be a tensor, got list"),
    ({"tokens": torch.zeros(3)}, TypeError, "tokens must be torch.int64, got torch.float32"),
    ({"tokens": torch.tensor([3, 50])}, IndexError, r"tokens must be in \[0, 50\), got 50"),
    ({"tokens": torch.tensor([3, -1])}, IndexError, r"tokens must be in \[0, 50\), got -1"),
    ({"tables": []}, ValueError, "tables and projections must be as many"),
    ({"projections": PROJECTIONS[:2]}, ValueError, "got 3 and 2"),
    ({"cutoffs": (10, 26)}, ValueError, r"cutoffs must be \[10, 25\], .* got \[10, 26\]"),
    ({"cutoffs": (10,)}, ValueError, "cutoffs must be"),
    ({"cutoffs": 10}, TypeError, "cutoffs must be a sequence"),
    ({"cutoffs": (10.0, 25.0)}, TypeError, "every cutoff must be an integer"),
    ({"scale": None}, TypeError, "scale must be a number"),
    (
        {"projections": [PROJECTIONS[0], PROJECTIONS[0], PROJECTIONS[2]]},
        ValueError,
        r"projections\[1\] must have shape \[8, 4\], got \[8, 8\]",
    ),
    (
        {"projections": [None, None, PROJECTIONS[2]]},
        ValueError,
        r"tables\[1\] must have shape \[V_1, 8\], got \[15, 4\]",
    ),
    (
        {"tables": [TABLES[0], TABLES[1].double(), TABLES[2]]},
        TypeError,
        r"tables\[1\] must be torch.float32, got torch.float64",
    ),
    (
        {"tables": [TABLES[0], TABLES[1], TABLES[2].to("meta")]},
        ValueError,
        r"tables\[2\] must be on cpu, got meta",
    ),
    ({"tables": [TABLES[0], TABLES[1][:0], TABLES[2]]}, ValueError, "must hold a token"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_argument(change, error, message):
    call = {"tokens": torch.arange(V), "tables": TABLES, "projections": PROJECTIONS}
    with pytest.raises(error, match=f"adaptive_embedding: .*{message}"):
        adaptive_embedding(**{**call, "cutoffs": CUTOFFS, **change})
