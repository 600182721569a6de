"""The adaptive ops at their edges: WikiText-103's vocabulary and one of ten tokens, few and ragged
tokens, all of them in one cluster, clusters without any."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from txl_kernels import (
    adaptive_embedding,
    adaptive_log_prob,
    adaptive_loss,
    adaptive_nll,
    adaptive_sample,
    adaptive_topk,
)
from txl_kernels.testing import AdaptiveSoftmaxCase as Case
from txl_kernels.testing import check_budget

WT103 = Case("wt103", V=267_735, cutoffs=(20_000, 40_000, 200_000), d=8)
ONE_WIDTH = dataclasses.replace(WT103, name="wt103_one_width", d=5, project=False)
TEN = Case("ten", V=10, cutoffs=(1, 2, 9), d=8)
CASES = (WT103, ONE_WIDTH, TEN)
# How many tokens, and the clusters that they fall in.
TOKENS = [(1, (3,)), (19, (0,)), (19, (1,)), (19, (3,)), (19, (0, 2)), (19, (0, 1, 2, 3))]
# In bfloat16 one token alone, one tail alone, and all clusters.
LOSSES = [(*tokens, torch.float32) for tokens in TOKENS]
LOSSES += [(*TOKENS[n], torch.bfloat16) for n in (0, 2, 5)]
FORBIDDEN = -torch.inf


@pytest.fixture(params=["reference", "native"])
def backend(request, require_backend):
    require_backend("adaptive_nll", request.param, needs_grad=True)
    return request.param


def _tokens(case, used, N):
    """N tokens: the first and the last of each used cluster in turn, then any of theirs."""
    edges = list(itertools.pairwise((0, *case.cutoffs, case.V)))
    ends = [edge for k in used for edge in (edges[k][0], edges[k][1] - 1)]
    generator = torch.Generator().manual_seed(7)
    drawn = [
        int(torch.randint(*edges[used[n % len(used)]], (), generator=generator)) for n in range(N)
    ]
    return torch.tensor([*ends, *drawn][:N])


def _leaves(inputs):
    hidden, _, head, tails = inputs
    tensors = [hidden, *head, *(x for tail in tails for x in tail)]
    return [x for x in tensors if x is not None]


def _double(inputs):
    def leaf(x):
        return None if x is None else x.detach().double().requires_grad_()

    hidden, target, head, tails = inputs
    return leaf(hidden), target, tuple(map(leaf, head)), [tuple(map(leaf, t)) for t in tails]


@pytest.mark.parametrize(("N", "used", "dtype"), LOSSES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_are_the_reference_s(require_backend, dtype, case, N, used):
    require_backend("adaptive_nll", "native", needs_grad=True)
    case = dataclasses.replace(case, N=N)
    inputs = case.inputs(dtype)
    inputs[1].copy_(_tokens(case, used, N))
    exact = _double(inputs)
    for op in (adaptive_nll, adaptive_loss):
        calls = ((inputs, "native"), (exact, "reference"), (inputs, "reference"))
        results = [case.call(op, x, backend=name) for x, name in calls]
        check_budget(op.__name__, *results, dtype=dtype)
        grads = [
            torch.autograd.grad(value.sum(), _leaves(x))
            for value, (x, _) in zip(results, calls, strict=True)
        ]
        largest = max(float(x.detach().abs().max()) for x in _leaves(exact))
        for n, tensors in enumerate(zip(*grads, strict=True)):
            name = f"{op.__name__} gradient {n}"
            check_budget(name, *tensors, dtype=dtype, magnitude=largest, is_sum=True)
        of_tails = iter(grads[0][-sum(x is not None for tail in inputs[3] for x in tail) :])
        for k, tail in enumerate(inputs[3], 1):
            own = [next(of_tails) for x in tail if x is not None]
            assert k in used or not any(grad.any() for grad in own)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("N", [1, 7])
def test_log_probs_sum_to_1_hold_the_loss_and_the_top(backend, case, N):
    case = dataclasses.replace(case, N=N)
    inputs = case.inputs(torch.float64)
    inputs[1].copy_(_tokens(case, (0, 1, 2, 3), N))
    log_probs = case.call(adaptive_log_prob, inputs)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(N).double())
    nll = case.call(adaptive_nll, inputs, backend=backend)
    torch.testing.assert_close(nll, -log_probs.gather(1, inputs[1][:, None])[:, 0])
    for k in (1, 10):
        values, tokens = case.call(adaptive_topk, inputs, k=k)
        due_values, due_tokens = log_probs.topk(k, 1)
        torch.testing.assert_close(values, due_values.detach())
        assert torch.equal(tokens, due_tokens)
    likeliest = case.call(adaptive_sample, inputs, temperature=0)
    assert torch.equal(likeliest, log_probs.argmax(1))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("cluster", [0, 1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_probability_in_one_cluster_draws_from_it_alone(case, cluster, options):
    case = dataclasses.replace(case, N=9)
    inputs = case.inputs(torch.float32)
    c0, edges = case.cutoffs[0], (0, *case.cutoffs, case.V)
    bias = inputs[2][2].detach()
    bias[c0:] = FORBIDDEN
    if cluster > 0:
        bias[:c0] = FORBIDDEN
        bias[c0 + cluster - 1] = 0.0
    generator = torch.Generator().manual_seed(1)
    drawn = case.call(adaptive_sample, inputs, **options, generator=generator)
    assert ((drawn >= edges[cluster]) & (drawn < edges[cluster + 1])).all()
    _, top = case.call(adaptive_topk, inputs, k=1)
    assert ((top >= edges[cluster]) & (top < edges[cluster + 1])).all()
    log_probs = case.call(adaptive_log_prob, inputs)
    inside = log_probs[:, edges[cluster] : edges[cluster + 1]]
    torch.testing.assert_close(inside.exp().sum(1), torch.ones(9), rtol=1e-4, atol=0)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("N", "used"), TOKENS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings_are_the_rows_of_tokens(backend, case, N, used, sparse):
    tables, projections = _tables(case)
    tokens = _tokens(case, used, N)
    leaves = [x for x in (*tables, *projections) if x is not None]
    out = adaptive_embedding(
        tokens, tables, projections, case.cutoffs, 3.0, sparse=sparse, backend=backend
    )
    assert out.shape == (N, case.d)
    rows, edges = [], (0, *case.cutoffs)
    for token in tokens.tolist():
        k = sum(token >= cutoff for cutoff in case.cutoffs)
        row = tables[k][token - edges[k]]
        rows.append(3.0 * (row if projections[k] is None else projections[k] @ row))
    due = torch.stack(rows)
    torch.testing.assert_close(out, due)
    dout = torch.randn(N, case.d, dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves, dout)
    due_grads = torch.autograd.grad(due, leaves, dout, allow_unused=True, materialize_grads=True)
    for grad, due_grad in zip(grads, due_grads, strict=True):
        torch.testing.assert_close(grad.to_dense(), due_grad)


def _tables(case):
    """A table per cluster and its projection, leaves in float64."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    edges = (0, *case.cutoffs, case.V)
    widths = [max(1, case.d // 2**k) if case.project else case.d for k in range(4)]
    sizes = [end - first for first, end in itertools.pairwise(edges)]
    tables = [normal(size, width) for size, width in zip(sizes, widths, strict=True)]
    return tables, [normal(case.d, width) if case.project else None for width in widths]
