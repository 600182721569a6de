"""The adaptive ops with clusters of width 0: logits are the biases, or all alike."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import adaptive_embedding, adaptive_loss, adaptive_nll

SIZES = (7, 12)
# N, d, the widths of both clusters, whether they have projections, whether they have biases.
CASES = [
    (6, 4, (4, 0), True, True),
    (6, 4, (0, 3), True, True),
    (6, 4, (0, 0), True, False),
    (6, 0, (0, 0), False, True),
    (6, 0, (3, 2), True, True),
    (0, 4, (0, 2), True, True),
]


@pytest.fixture(params=["native", pytest.param("triton", marks=pytest.mark.interpreted)])
def backend(request, require_backend):
    require_backend("adaptive_nll", request.param, needs_grad=True)
    return request.param


def _normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _clusters(d, widths, projected, biased):
    clusters = []
    for k, (size, width) in enumerate(zip(SIZES, widths, strict=True)):
        n_columns = size + (k == 0)
        projection = _normal(width, d) if projected else None
        clusters.append((projection, _normal(n_columns, width), _normal(n_columns)))
    return [(p, w, b if biased else None) for p, w, b in clusters]


def _with_gradients(function, tensors, backend):
    leaves = [x.detach().requires_grad_() for x in tensors if x is not None]
    given = iter(leaves)
    value = function(*(None if x is None else next(given) for x in tensors), backend=backend)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("N", "d", "widths", "projected", "biased"), CASES, ids=str)
def test_losses_and_gradients(backend, N, d, widths, projected, biased, reduction):
    target = torch.arange(N) * 3

    def loss(hidden, p0, w0, b0, p1, w1, b1, backend):
        tails, weights = [(p1, w1, b1)], {"cutoffs": (7,), "head_bias": b0, "head_proj": p0}
        if reduction == "none":
            return adaptive_nll(hidden, target, w0, tails, **weights, backend=backend)
        return adaptive_loss(
            hidden, target, w0, tails, **weights, reduction=reduction, backend=backend
        )

    head, tail = _clusters(d, widths, projected, biased)
    tensors = [_normal(N, d), *head, *tail]
    torch.testing.assert_close(
        _with_gradients(loss, tensors, backend), _with_gradients(loss, tensors, "reference")
    )


def test_a_cluster_of_width_0_is_uniform(backend):
    head, tail = torch.zeros(8, 4), (torch.zeros(0, 4), torch.zeros(12, 0), None)
    target = torch.tensor([0, 18])
    nll = adaptive_nll(_normal(2, 4), target, head, [tail], cutoffs=(7,), backend=backend)
    torch.testing.assert_close(nll, torch.tensor([8.0, 8.0 * 12.0]).log())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("N", "d", "widths", "projected", "biased"), CASES, ids=str)
def test_embeddings(backend, N, d, widths, projected, biased, sparse):
    tokens = torch.arange(N) * 3

    def embed(*weights, backend):
        tables, projections = weights[:2], weights[2:]
        options = {"sparse": sparse, "backend": backend}
        return adaptive_embedding(tokens, tables, projections, (7,), 2.0, **options)

    tables = [_normal(size, width) for size, width in zip(SIZES, widths, strict=True)]
    tensors = [*tables, *(_normal(d, width) if projected else None for width in widths)]
    actual, expected = (
        [x.to_dense() for x in _with_gradients(embed, tensors, name)]
        for name in (backend, "reference")
    )
    torch.testing.assert_close(actual, expected)
