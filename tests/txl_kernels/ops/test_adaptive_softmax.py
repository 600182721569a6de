"""Adaptive softmax against the plain formula, torch's own module, and what it means."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import adaptive_log_prob, adaptive_loss, adaptive_nll, adaptive_topk
from txl_kernels.backends.reference import adaptive_softmax as reference
from txl_kernels.testing import ADAPTIVE_SOFTMAX_CASES as CASES
from txl_kernels.testing import AdaptiveSoftmaxCase as Case
from txl_kernels.testing import check_adaptive_softmax, check_budget


@pytest.fixture(params=["reference", "native"])
def backend(request, require_backend):
    require_backend("adaptive_nll", request.param, needs_grad=True)
    return request.param


def _leaves(inputs):
    hidden, _, head, tails = inputs
    tensors = [hidden, *head, *(x for tail in tails for x in tail)]
    return [x for x in tensors if x is not None]


def _all_log_probs(inputs, cutoffs):
    """The formula in one go, in the inputs' own dtype."""
    hidden, _, head, tails = inputs

    def log_softmax(cluster):
        projection, weight, bias = cluster
        logits = (hidden if projection is None else hidden @ projection.T) @ weight.T
        return (logits if bias is None else logits + bias).log_softmax(1)

    first = log_softmax(head)
    c0 = first.shape[1] - len(tails)
    parts = [log_softmax(tail) + first[:, c0 + k, None] for k, tail in enumerate(tails)]
    return torch.cat([first[:, :c0], *parts], 1)


def _plain_nll(inputs, cutoffs):
    target = inputs[1]
    picked = _all_log_probs(inputs, cutoffs).gather(1, target.clamp(min=0)[:, None])[:, 0]
    return -picked.masked_fill(target == -100, 0.0)


def _double(inputs):
    def leaf(x):
        return None if x is None else x.detach().double().requires_grad_()

    hidden, target, head, tails = inputs
    return leaf(hidden), target, tuple(map(leaf, head)), [tuple(map(leaf, t)) for t in tails]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_loss_per_token_and_gradients_are_within_the_error_budget(backend, dtype, case):
    inputs = case.inputs(dtype)
    check_adaptive_softmax("adaptive_nll", inputs, case.cutoffs, backend)
    check_adaptive_softmax("adaptive_loss", inputs, case.cutoffs, backend)
    nll = case.call(adaptive_nll, inputs, backend=backend)
    assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mean_loss_and_gradients_are_within_the_error_budget(backend, dtype, case):
    inputs = case.inputs(dtype)
    exact = _double(inputs)
    counted = max(1, int((inputs[1] >= 0).sum()))
    losses = (
        case.call(adaptive_loss, inputs, backend=backend),
        _plain_nll(exact, case.cutoffs).sum() / counted,
        _plain_nll(inputs, case.cutoffs).sum() / counted,
    )
    check_budget("loss", *losses, dtype=dtype)
    leaves = (_leaves(inputs), _leaves(exact), _leaves(inputs))
    grads = [torch.autograd.grad(*call) for call in zip(losses, leaves, strict=True)]
    largest = max(float(x.detach().abs().max()) for x in _leaves(exact)) / counted
    for n, results in enumerate(zip(*grads, strict=True)):
        check_budget(f"gradient {n}", *results, dtype=dtype, magnitude=largest, is_sum=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_probabilities_sum_to_1_and_hold_the_loss(case):
    inputs = case.inputs(torch.float64)
    log_probs = case.call(adaptive_log_prob, inputs)
    assert log_probs.shape == (case.N, case.V)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(case.N).double())
    torch.testing.assert_close(log_probs, _all_log_probs(inputs, case.cutoffs))
    counted = inputs[1] >= 0
    picked = log_probs[counted].gather(1, inputs[1][counted, None])[:, 0]
    torch.testing.assert_close(case.call(adaptive_nll, inputs)[counted], -picked)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("k", [1, 10])
def test_topk_is_the_top_of_all(case, k):
    inputs = case.inputs(torch.float64)
    values, tokens = case.call(adaptive_topk, inputs, k=k)
    due_values, due_tokens = _all_log_probs(inputs, case.cutoffs).topk(k, 1)
    torch.testing.assert_close(values, due_values.detach())
    assert torch.equal(tokens, due_tokens)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_reduces_what_is_not_ignored(backend, reduction):
    case = CASES[0]
    inputs = case.inputs(torch.float64)
    nll = case.call(adaptive_nll, inputs, backend=backend)
    loss = case.call(adaptive_loss, inputs, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, nll.sum() / (case.N - 1 if reduction == "mean" else 1))


def test_equals_torch_s_adaptive_softmax():
    module = torch.nn.AdaptiveLogSoftmaxWithLoss(16, 60, [10, 30], div_value=2.0, head_bias=True)
    hidden = torch.randn(40, 16)
    target = torch.randint(0, 60, (40,))
    tails = [(tail[0].weight, tail[1].weight, None) for tail in module.tail]
    head = module.head
    nll = adaptive_nll(hidden, target, head.weight, tails, cutoffs=(10, 30), head_bias=head.bias)
    torch.testing.assert_close(nll, -module(hidden, target).output)
    log_probs = adaptive_log_prob(hidden, head.weight, tails, cutoffs=(10, 30), head_bias=head.bias)
    torch.testing.assert_close(log_probs, module.log_prob(hidden))


def test_without_tails_it_is_cross_entropy(backend):
    case = Case("", V=50, project=False)
    inputs = case.inputs(torch.float64)
    hidden, target, (_, weight, bias), _ = inputs
    due = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, target)
    torch.testing.assert_close(case.call(adaptive_loss, inputs, backend=backend), due)


def test_a_cluster_without_targets_gets_a_zero_gradient(backend):
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    inputs[1].clamp_(max=24)
    case.call(adaptive_loss, inputs, backend=backend).backward()
    assert all(not x.grad.any() and x.grad.shape == x.shape for x in inputs[3][1])
    assert all(x.grad.any() for x in inputs[3][0])


def test_ignored_targets_give_no_loss_and_no_gradient(backend):
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    inputs[1][::2] = -100
    nll = case.call(adaptive_nll, inputs, backend=backend)
    nll.sum().backward()
    assert not nll[::2].any()
    assert not inputs[0].grad[::2].any()


def test_all_targets_ignored_is_a_loss_of_0(backend):
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    inputs[1].fill_(-100)
    loss = case.call(adaptive_loss, inputs, backend=backend)
    loss.backward()
    assert loss == 0
    assert not any(x.grad.any() for x in _leaves(inputs))


def test_an_ignore_index_inside_the_vocabulary_is_ignored(backend):
    case = Case("", V=50, cutoffs=(10, 25))
    inputs = case.inputs(torch.float64)
    inputs[1][:] = torch.arange(case.N)
    nll = case.call(adaptive_nll, inputs, ignore_index=7, backend=backend)
    assert nll[7] == 0
    assert nll[:7].all()


@pytest.mark.parametrize("N", [0, 1, 2, 255, 257])
def test_ragged_token_counts(backend, N):
    case = Case("", V=50, cutoffs=(10, 25), N=N)
    nll = case.call(adaptive_nll, case.inputs(torch.float32), backend=backend)
    assert nll.shape == (N,)
    assert nll.isfinite().all()


def test_no_logits_are_kept_for_backward(monkeypatch):
    monkeypatch.setattr(reference, "_MIN_COLUMNS", 8)
    case = Case("", V=400, cutoffs=(100,), N=64, d=4)
    inputs = case.inputs(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        case.call(adaptive_loss, inputs, backend="reference")
    weights = {x.untyped_storage().data_ptr() for x in _leaves(inputs)}
    others = [x.numel() for x in saved if x.untyped_storage().data_ptr() not in weights]
    assert max(others) < case.N * 100  # of 64 × 400 logits
