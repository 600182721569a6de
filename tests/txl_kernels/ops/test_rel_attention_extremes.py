"""Scores and factors of any magnitude: finite results, as exact as torch's own attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from txl_kernels import rel_attention

B, H, T, D = 1, 2, 130, 64


@pytest.fixture(params=["reference", "native"])
def backend(request, require_backend):
    require_backend("rel_attention", request.param, needs_grad=True)
    return request.param


def normal(*shape, dtype, factor=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * factor).to(dtype)


def with_gradients(attend, inputs, weights):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [(torch.float32, m) for m in (3e4, 1e9, 1e12, 1e15)]
    + [(torch.float64, m) for m in (3e4, 1e13, 1e100)]
    + [(torch.bfloat16, 3e4), (torch.bfloat16, 1e15), (torch.float16, 3e3)],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 30.0}], ids=str)
def test_large_scores_give_finite_results(options, dtype, magnitude, backend):
    torch.manual_seed(0)
    q, k = (normal(B, H, T, D, dtype=dtype, factor=magnitude) for _ in range(2))
    v, r = normal(B, H, T, D, dtype=dtype), normal(1, H, 2 * T - 1, D, dtype=dtype)
    weights = normal(B, H, T, D, dtype=dtype)

    def attend(q, k, v, r):
        return rel_attention(q, k, v, r, **options, backend=backend)

    results = with_gradients(attend, (q, k, v, r), weights)
    assert all(x.isfinite().all() for x in results)
    if dtype in (torch.float32, torch.float64) and "softcap" not in options:
        # One key has all the weight of a row; in float64 it is the same one.
        exact = rel_attention(*(x.double() for x in (q, k, v, r)), **options, backend="reference")
        assert torch.allclose(results[0].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 1e2, 4e2, 1e4, 1e6])
def test_gradients_of_large_scores_are_as_exact_as_those_of_sdpa(spread, backend):
    torch.manual_seed(1)
    q, k = (normal(B, H, T, D, dtype=torch.float32, factor=spread**0.5 * 3) for _ in range(2))
    v, weights = (normal(B, H, T, D, dtype=torch.float32) for _ in range(2))
    r = torch.zeros(1, H, 2 * T - 1, D)

    def ours(q, k, v):
        return rel_attention(q, k, v, r, backend=backend)

    exact = with_gradients(scaled_dot_product_attention, [x.double() for x in (q, k, v)], weights)
    sdpa = with_gradients(scaled_dot_product_attention, (q, k, v), weights)
    results = with_gradients(ours, (q, k, v), weights)
    for name, result, peer, due in zip(
        ("out", "dq", "dk", "dv"), results, sdpa, exact, strict=True
    ):
        # A gradient that cancels to 0 has the error of the products that enter it.
        size = max(float(due.abs().max()), float(k.abs().max()) * 2**-20)
        error, peer_error = (float((x.double() - due).abs().max()) / size for x in (result, peer))
        assert error <= 1.5 * peer_error + 3e-6, name


@pytest.mark.parametrize("scale", [2e5, -2e8, 1e12])
def test_one_dominant_key_gets_the_whole_gradient_of_its_value(scale, backend):
    # Row i of v is read by query i alone, so that dv = dout exactly.
    q = torch.eye(16).expand(1, 2, 16, 16) * 3
    v, r = torch.randn(1, 2, 16, 16, requires_grad=True), torch.zeros(1, 2, 31, 16)
    weights = torch.randn(1, 2, 16, 16)
    out = rel_attention(
        q, q * scale, v, r, scale=float(torch.tensor(scale).sign()), backend=backend
    )
    (dv,) = torch.autograd.grad(out, v, weights)
    assert torch.equal(dv, weights)
    assert torch.equal(out, v)


TINY = [1e-46, -1e-46, 1e-40, 1e-300, 5e-324, 0.0, -0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{"scale": scale} for scale in TINY], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_tiny_factors_average_the_values(softcap, options, dtype, backend):
    torch.manual_seed(2)
    inputs = [normal(B, H, n, D, dtype=dtype) for n in (T, T, T, 2 * T - 1)]
    weights = normal(B, H, T, D, dtype=dtype)

    def attend(*leaves):
        return rel_attention(*leaves, **options, softcap=softcap, causal=True, backend=backend)

    out, dq, dk, dv, dr = with_gradients(attend, inputs, weights)
    counts = torch.arange(1, T + 1, dtype=torch.float64)[:, None]
    mean = inputs[2].double().cumsum(2) / counts
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(out.double(), mean, rtol=tolerance, atol=tolerance)
    assert all(x.isfinite().all() for x in (dv, dq, dk, dr))
    assert float(max(x.abs().max() for x in (dq, dk, dr))) < 1e-30


@pytest.mark.parametrize("softcap", [1e-46, 1e-30, 1e-5, 1e30, 1e300])
def test_any_softcap_gives_what_float64_gives(softcap, backend):
    torch.manual_seed(3)
    inputs = [normal(B, H, n, D, dtype=torch.float32) for n in (T, T, T, 2 * T - 1)]
    weights = normal(B, H, T, D, dtype=torch.float32)

    def attend(*leaves, backend=backend):
        return rel_attention(*leaves, softcap=softcap, causal=True, backend=backend)

    def exact(*leaves):
        return attend(*leaves, backend="reference")

    expected = with_gradients(exact, [x.double() for x in inputs], weights)
    for result, due in zip(with_gradients(attend, inputs, weights), expected, strict=True):
        assert torch.allclose(result.double(), due, rtol=1e-4, atol=2e-5)
