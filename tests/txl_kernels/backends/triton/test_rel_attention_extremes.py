"""Scores and factors of any magnitude in Triton's kernels."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_attention

pytestmark = pytest.mark.interpreted
B, H, T, D = 1, 2, 20, 16


@pytest.fixture(autouse=True)
def _triton(require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)


def inputs(factor=1.0):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D) for _ in range(3))
    leaves = (q * factor, k * factor, v, torch.randn(1, H, 2 * T - 1, D))
    return [x.requires_grad_() for x in leaves], torch.randn(B, H, T, D)


def with_gradients(leaves, weights, *, backend="triton", **options):
    out = rel_attention(*leaves, **options, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, weights)]


@pytest.mark.parametrize("factor", [3e4, 1e9, 1e15])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 30.0}], ids=str)
def test_large_scores_give_finite_results(options, factor):
    results = with_gradients(*inputs(factor), **options)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("size", [2e5, -2e8, 1e12])
def test_one_dominant_key_gets_the_whole_gradient_of_its_value(size):
    q = torch.eye(16).expand(1, 2, 16, 16) * 3
    r, weights = torch.zeros(1, 2, 31, 16), torch.randn(1, 2, 16, 16)
    v = torch.randn(1, 2, 16, 16, requires_grad=True)
    out = rel_attention(q, q * size, v, r, scale=1.0 if size > 0 else -1.0, backend="triton")
    (dv,) = torch.autograd.grad(out, v, weights)
    assert torch.equal(dv, weights)


@pytest.mark.parametrize(
    "options",
    [{"scale": scale} for scale in (1e-46, -1e-46, 1e-40, 0.0)]
    + [{"softcap": softcap} for softcap in (1e-46, 1e-30, 1e30, 1e300)],
    ids=str,
)
def test_any_factor_gives_what_float64_gives(options):
    leaves, weights = inputs()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    results = with_gradients(leaves, weights, causal=True, **options)
    expected = with_gradients(wide, weights.double(), backend="reference", causal=True, **options)
    for actual, due in zip(results, expected, strict=True):
        assert torch.allclose(actual.double(), due, rtol=1e-4, atol=1e-5)
