"""Adaptive embedding against row by row look-up, its gradients and torch's tools."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import adaptive_embedding

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


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 11), (2, 3, 4)])
def test_is_the_projected_row_of_each_token(shape):
    tokens = torch.randint(0, V, shape)
    weights = _weights()
    actual = adaptive_embedding(tokens, *weights, CUTOFFS, 2.5)
    due = _row_by_row(tokens, *weights, 2.5)
    torch.testing.assert_close(actual, due)
    dout, leaves = torch.randn_like(due), [*weights[0], *weights[1]]
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, dout),
        torch.autograd.grad(due, leaves, dout, allow_unused=True, materialize_grads=True),
    )


def test_without_projections_and_cutoffs_it_is_an_embedding():
    table, tokens = torch.randn(V, 6), torch.randint(0, V, (4, 5))
    due = 3 * torch.nn.functional.embedding(tokens, table)
    torch.testing.assert_close(adaptive_embedding(tokens, [table], [None], scale=3.0), due)


def test_a_table_may_stand_unprojected_beside_projected_ones():
    tables, (_, *projections) = _weights()
    tokens = torch.arange(V)
    actual = adaptive_embedding(tokens, tables, [None, *projections], CUTOFFS)
    torch.testing.assert_close(actual, _row_by_row(tokens, tables, [None, *projections], 1.0))


def test_tables_without_tokens_get_a_zero_gradient():
    tables, projections = _weights()
    adaptive_embedding(torch.arange(25), tables, projections, CUTOFFS).sum().backward()
    assert not tables[2].grad.any()
    assert not projections[2].grad.any()
    assert tables[1].grad.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_float32(dtype):
    tables, projections = _weights(dtype)
    exact = [x.double() for x in tables], [x.double() for x in projections]
    tokens = torch.arange(V)
    actual = adaptive_embedding(tokens, tables, projections, CUTOFFS, 4.0)
    due = adaptive_embedding(tokens, *exact, CUTOFFS, 4.0)
    assert actual.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), due, rtol=rounding, atol=8 * rounding)


def test_empty_tokens():
    tables, projections = _weights()
    tokens = torch.empty(2, 0, dtype=torch.int64)
    assert adaptive_embedding(tokens, tables, projections, CUTOFFS).shape == (2, 0, 8)


def test_gradcheck():
    tables, projections = _weights()
    tokens = torch.randint(0, V, (6,))
    assert torch.autograd.gradcheck(
        lambda *x: adaptive_embedding(tokens, x[:3], x[3:], CUTOFFS, 2.0),
        (*tables, *projections),
        fast_mode=True,
    )


def test_compiles_and_exports_with_dynamic_lengths():
    class Embedding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            tables, projections = _weights(torch.float32)
            self.tables = torch.nn.ParameterList(tables)
            self.projections = torch.nn.ParameterList(projections)

        def forward(self, tokens):
            return adaptive_embedding(tokens, list(self.tables), list(self.projections), CUTOFFS)

    torch.compiler.reset()
    module, tokens = Embedding(), torch.randint(0, V, (2, 9))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), module(tokens))
    T = torch.export.Dim("T", min=2, max=1000)
    program = torch.export.export(module, (tokens,), dynamic_shapes=({1: T},))
    tokens = torch.randint(0, V, (2, 31))
    torch.testing.assert_close(program.module()(tokens), module(tokens))


def test_autocast_gives_its_dtype():
    tables, projections = _weights(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = adaptive_embedding(torch.arange(V), tables, projections, CUTOFFS)
    assert out.dtype == torch.bfloat16


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
