"""The adaptive losses at the limits of a dtype: loss scales in float16, and large logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from txl_kernels import adaptive_loss, adaptive_nll

N, V, D = 16, 24, 12
FACTORS = [1 / N, 1.0, 65_504.0, 65_536.0, 2.0**24]


@pytest.fixture(params=["native", pytest.param("triton", marks=pytest.mark.interpreted)])
def backend(request, require_backend):
    require_backend("adaptive_nll", request.param, dtype=torch.float16, needs_grad=True)
    return request.param


def _agree(grads, exact, factor):
    """Up to roundings of float16, also of a product's terms, wherever it holds the gradient."""
    for grad, unscaled in zip(grads, exact, strict=True):
        due = unscaled * factor
        held = due.abs() < 65_504
        assert not grad.isnan().any()
        error = (grad.double() - due)[held].norm()
        assert error <= due.norm() / 2**11 + due.numel() ** 0.5 / 2**24


def _float16_inputs():
    """hidden, target, head, and a projected tail; products are exact in float16."""
    generator = torch.Generator().manual_seed(3)

    def whole(*shape):
        return torch.randint(-2, 3, shape, generator=generator).half() / 4

    projection = torch.eye(4, D).half() / 2
    weights = [whole(11, D), whole(11), projection, whole(14, 4), whole(14)]
    return [whole(N, D), *weights], torch.randint(0, V, (N,), generator=generator)


def _loss(tensors, target, reduction, backend):
    hidden, head, head_bias, projection, tail, bias = tensors
    options = {"cutoffs": (10,), "head_bias": head_bias, "backend": backend}
    call = (hidden, target, head, [(projection, tail, bias)])
    if reduction == "none":
        return adaptive_nll(*call, **options).sum()
    return adaptive_loss(*call, **options, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_float16_gradients_under_any_loss_scale(backend, reduction):
    tensors, target = _float16_inputs()
    leaves = [x.requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = torch.autograd.grad(_loss(wide, target, "none", "reference"), wide)
    for factor in FACTORS if backend == "native" else FACTORS[::3]:
        loss = _loss(leaves, target, reduction, backend)
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(factor * loss, leaves)
        assert all(grad.dtype == torch.float16 for grad in grads)
        _agree(grads, exact, factor / N if reduction == "mean" else factor)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("in_tail", [False, True], ids=["head", "tail"])
def test_float16_gradients_of_tiny_probabilities(backend, in_tail, reduction):
    """Half of the columns have p = 2e-9 or less: 0 in float16, but not times the loss scale."""
    bias = torch.zeros(30).half()
    bias[::2] = -20.0
    bias[10] = -28.0
    target = torch.arange(1, 30, 2)
    hidden = torch.ones(len(target), 2).half()
    cluster = [torch.zeros(30, 2).half(), bias]
    leaves = [x.requires_grad_() for x in (hidden, *cluster)]

    def loss(hidden, weight, bias, backend):
        head = weight.new_zeros(2, 2)
        head_bias = weight.new_tensor([-12.0, 0.0])
        clusters = (head, [(None, weight, bias)]) if in_tail else (weight, [])
        options = {"cutoffs": (1,), "head_bias": head_bias} if in_tail else {"cutoffs": ()}
        options |= {"backend": backend} if in_tail else {"head_bias": bias, "backend": backend}
        call = (hidden, target + in_tail, *clusters)
        if reduction == "none":
            return adaptive_nll(*call, **options).sum()
        return adaptive_loss(*call, **options, reduction=reduction)

    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(loss(*wide, "reference"), wide)[1][::2]
    assert 0 < exact.abs().min() < exact.abs().max() < 1e-8
    for factor in (65_504.0, 2.0**24):
        grad = torch.autograd.grad(factor * loss(*leaves, backend), leaves)[1][::2]
        torch.testing.assert_close(grad.double(), factor * exact, rtol=2e-3, atol=2.0**-24)


@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss], ids=lambda op: op.__name__)
@pytest.mark.parametrize("size", [2e5, 2e8, 1e30])
@pytest.mark.parametrize("tied", [False, True], ids=["one", "tied"])
def test_gradients_of_large_logits_are_as_exact_as_torch_s(backend, tied, size, op):
    """One token dominates, or six share its logit; products have one term, so they are exact."""
    hidden = torch.zeros(10, 2)
    hidden[:, 0] = size
    weight = torch.zeros(150, 2)
    weight[:, 0] = torch.arange(150) % 5 / 8
    weight[::30, 0] = 1.0 if tied else 0.5
    weight[5, 0] = 1.0
    target = torch.arange(10) % 8

    def results(dtype, loss):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        value = loss(*leaves).sum()
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    def torch_s(hidden, weight):
        return F.cross_entropy(hidden @ weight.T, target, reduction="sum")

    def ours(hidden, weight):
        options = {} if op is adaptive_nll else {"reduction": "sum"}
        return op(hidden, target, weight, [], cutoffs=(), backend=backend, **options)

    actual, eager = results(torch.float32, ours), results(torch.float32, torch_s)
    for x, other, exact in zip(actual, eager, results(torch.float64, torch_s), strict=True):
        error, due = ((value.double() - exact).abs().max() for value in (x, other))
        assert error <= 2 * due + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss], ids=lambda op: op.__name__)
def test_many_forbidden_tokens_come_first(backend, op):
    """The largest of the first 100 logits is -inf, and differences of infinities are NaN."""
    bias = torch.zeros(150)
    bias[:100] = -torch.inf
    hidden, weight = torch.ones(4, 3), torch.zeros(150, 3, requires_grad=True)
    options = {"cutoffs": (), "head_bias": bias, "backend": backend}
    loss = op(hidden, torch.tensor([100, 120, 149, 110]), weight, [], **options).sum()
    count = 4 if op is adaptive_nll else 1
    torch.testing.assert_close(loss.detach(), count * torch.tensor(50.0).log())
    (grad,) = torch.autograd.grad(loss, weight)
    assert not grad[:100].any()
    assert grad.isfinite().all()
