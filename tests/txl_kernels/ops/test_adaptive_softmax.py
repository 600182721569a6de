"""Adaptive softmax against the plain formula, torch's own module, and what it means."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from txl_kernels import adaptive_log_prob, adaptive_loss, adaptive_nll, adaptive_topk
from txl_kernels.backends.reference import adaptive_softmax as reference
from txl_kernels.testing import check_budget


@dataclass(frozen=True)
class Case:
    name: str
    V: int
    cutoffs: tuple[int, ...] = ()
    N: int = 37
    d: int = 12
    div: int = 2
    project: bool = True
    bias: bool = True

    def inputs(self, dtype):
        """hidden, target, and the other arguments, all leaves; the last target is ignored."""
        generator = torch.Generator().manual_seed(3)

        def normal(*shape):
            x = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            return x.to(dtype).requires_grad_()

        edges = (*self.cutoffs, self.V)
        n_tails = len(self.cutoffs)

        def cluster(k, n_columns):
            width = max(1, self.d // self.div**k) if self.project else self.d
            projection = normal(width, self.d) if self.project else None
            return projection, normal(n_columns, width), normal(n_columns) if self.bias else None

        head = cluster(0, edges[0] + n_tails)
        tails = [cluster(k + 1, edges[k + 1] - edges[k]) for k in range(n_tails)]
        hidden = normal(self.N, self.d)
        target = torch.randint(0, self.V, (self.N,), generator=generator)
        if self.N:
            target[-1] = -100
        return hidden, target, head, tails

    def call(self, op, inputs, **options):
        hidden, target, (head_proj, head_weight, head_bias), tails = inputs
        given = (hidden, target) if op in (adaptive_nll, adaptive_loss) else (hidden,)
        weights = {"cutoffs": self.cutoffs, "head_bias": head_bias, "head_proj": head_proj}
        return op(*given, head_weight, tails, **weights, **options)


CASES = [
    Case("two_tails", V=50, cutoffs=(10, 25)),
    Case("no_tails", V=50),
    Case("no_tails_no_projection", V=10, project=False, bias=False),
    Case("no_biases", V=50, cutoffs=(10, 25), bias=False),
    Case("no_projections", V=50, cutoffs=(10, 25), project=False),
    Case("ten_tokens", V=10, cutoffs=(1, 2, 9), N=7),
    Case("one_token", V=50, cutoffs=(10,), N=1),
    Case("two_pieces", V=9100, cutoffs=(4300,), N=5, d=4),
    Case("wide_ratio", V=700, cutoffs=(20, 60, 300), N=129, d=64, div=4),
]


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
    exact = _double(inputs)
    weight = torch.randn(case.N, generator=torch.Generator().manual_seed(5))
    nll = case.call(adaptive_nll, inputs, backend=backend)
    eager, due = _plain_nll(inputs, case.cutoffs), _plain_nll(exact, case.cutoffs)
    assert nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_budget("nll", nll, due, eager, dtype=dtype)
    grads, eager_grads, due_grads = (
        torch.autograd.grad(loss, _leaves(x), weight.to(loss.dtype))
        for loss, x in ((nll, inputs), (eager, inputs), (due, exact))
    )
    for n, (grad, eager_grad, due_grad) in enumerate(
        zip(grads, eager_grads, due_grads, strict=True)
    ):
        largest = float(weight.abs().max())
        check_budget(
            f"gradient {n}",
            grad,
            due_grad,
            eager_grad,
            dtype=dtype,
            magnitude=largest * max(float(x.detach().abs().max()) for x in _leaves(exact)),
            is_sum=True,
        )


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


@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss, adaptive_log_prob])
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.name)
def test_gradcheck(op, case):
    case = Case(case.name, case.V, case.cutoffs, 5, 6, case.div, case.project, case.bias)
    hidden, target, head, tails = case.inputs(torch.float64)
    leaves = _leaves((hidden, target, head, tails))
    assert torch.autograd.gradcheck(
        lambda *_: case.call(op, (hidden, target, head, tails)), leaves, fast_mode=True
    )


@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss, adaptive_log_prob])
def test_compiles_without_a_graph_break(op):
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: case.call(op, x), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    actual, due = compiled(inputs), case.call(op, inputs)
    torch.testing.assert_close(actual, due)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), _leaves(inputs)),
        torch.autograd.grad(due.sum(), _leaves(inputs)),
    )


def test_compiles_topk_with_inductor():
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: case.call(adaptive_topk, x, k=5), fullgraph=True)
    torch.testing.assert_close(compiled(inputs), case.call(adaptive_topk, inputs, k=5))


@pytest.mark.parametrize("strict", [False, True], ids=["tracing", "strict"])
def test_exports_with_a_dynamic_number_of_tokens(strict):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 12)
            self.tail = torch.nn.Linear(8, 15)

        def forward(self, hidden, target):
            tail = (None, self.tail.weight, self.tail.bias)
            return adaptive_nll(hidden, target, self.head.weight, [tail], cutoffs=(11,))

    module = Loss()
    N = torch.export.Dim("N", min=2, max=10_000)
    inputs = torch.randn(6, 8), torch.randint(0, 26, (6,))
    program = torch.export.export(module, inputs, dynamic_shapes=({0: N}, {0: N}), strict=strict)
    inputs = torch.randn(19, 8), torch.randint(0, 26, (19,))
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_autocast_casts_hidden_and_weights():
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        nll = case.call(adaptive_nll, inputs)
        nll.sum().backward()
    hidden, target, head, tails = inputs

    def lower(cluster):
        projection, weight, bias = cluster
        return projection.bfloat16(), weight.bfloat16(), bias

    due = case.call(adaptive_nll, (hidden.bfloat16(), target, lower(head), list(map(lower, tails))))
    assert nll.dtype == torch.float32
    assert torch.equal(nll, due)
    assert all(x.grad.dtype == torch.float32 for x in _leaves(inputs))


def test_no_logits_are_kept_for_backward(monkeypatch):
    monkeypatch.setattr(reference, "_MIN_COLUMNS", 8)
    case = Case("", V=400, cutoffs=(100,), N=64, d=4)
    inputs = case.inputs(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        case.call(adaptive_loss, inputs)
    weights = {x.untyped_storage().data_ptr() for x in _leaves(inputs)}
    others = [x.numel() for x in saved if x.untyped_storage().data_ptr() not in weights]
    assert max(others) < case.N * 100  # of 64 × 400 logits
