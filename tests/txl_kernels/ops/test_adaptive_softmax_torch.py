"""The adaptive softmax inside torch: autograd, autocast, opcheck, torch.compile, torch.export."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from txl_kernels import adaptive_log_prob, adaptive_loss, adaptive_nll, adaptive_topk
from txl_kernels._register_adaptive import is_one_table
from txl_kernels.testing import ADAPTIVE_SOFTMAX_CASES as CASES

NATIVE = torch.ops.txl_native


@pytest.fixture(params=["reference", "native"])
def backend(request, require_backend):
    require_backend("adaptive_nll", request.param, needs_grad=True)
    return request.param


@pytest.fixture
def native(require_backend):
    require_backend("adaptive_nll", "native", needs_grad=True)


def _leaves(inputs):
    hidden, _, head, tails = inputs
    tensors = [hidden, *head, *(x for tail in tails for x in tail)]
    return [x for x in tensors if x is not None]


def _schema_arguments(case, dtype=torch.float32, requires_grad=True):
    """hidden, target, clusters and ignore_index, as the operators take them."""
    hidden, target, head, tails = case.inputs(dtype)

    def given(x):
        return (
            torch.empty(0, dtype=dtype) if x is None else x.detach().requires_grad_(requires_grad)
        )

    clusters = [given(x) for cluster in (head, *tails) for x in cluster]
    return given(hidden), target, clusters, -100


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_gradcheck(backend, case):
    inputs = dataclasses.replace(case, N=5, d=6).inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *_: case.call(adaptive_nll, inputs, backend=backend), _leaves(inputs), fast_mode=True
    )


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_adaptive_loss_s_gradient_is_its_slope(backend, case):
    """gradcheck goes backward through one graph many times; here every call has one of its own."""
    inputs = dataclasses.replace(case, N=5, d=6).inputs(torch.float64)
    leaves, step = _leaves(inputs), 1e-5
    grads = torch.autograd.grad(case.call(adaptive_loss, inputs, backend=backend), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        way = torch.randn_like(leaf)
        losses = []
        for side in (step, -2 * step, step):  # ends where it began
            leaf.data.add_(way, alpha=side)
            losses.append(float(case.call(adaptive_loss, inputs, backend=backend)))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float((grad * way).sum()), rel=1e-6, abs=1e-9)


def test_gradcheck_of_log_prob():
    inputs = dataclasses.replace(CASES[0], N=5, d=6).inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *_: CASES[0].call(adaptive_log_prob, inputs), _leaves(inputs), fast_mode=True
    )


@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss], ids=lambda op: op.__name__)
def test_second_derivative_of_a_kernel_raises(op, native):
    inputs = CASES[0].inputs(torch.float32)
    loss = CASES[0].call(op, inputs, backend="native").square().sum()
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.__name__}: no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("retain", [False, True], ids=["freed", "retained"])
def test_a_second_backward_through_adaptive_loss_raises(retain, native):
    loss = CASES[0].call(adaptive_loss, CASES[0].inputs(torch.float32), backend="native")
    loss.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match="adaptive_loss: its gradients were returned"):
        loss.backward()


def test_a_second_backward_through_adaptive_nll_gives_the_same(native):
    inputs = CASES[0].inputs(torch.float32)
    loss = CASES[0].call(adaptive_nll, inputs, backend="native").sum()
    first = torch.autograd.grad(loss, _leaves(inputs), retain_graph=True)
    second = torch.autograd.grad(loss, _leaves(inputs))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adaptive_loss_scales_its_gradients(dtype, native):
    case = CASES[0]
    inputs = case.inputs(dtype)
    grads, scaled = (
        torch.autograd.grad(
            factor * case.call(adaptive_loss, inputs, backend="native"), _leaves(inputs)
        )
        for factor in (1.0, -4.0)
    )
    for grad, four in zip(grads, scaled, strict=True):
        torch.testing.assert_close(-4 * grad, four, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("wanted", [[True] * 10, [False] * 10, [True, False] * 5], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_loss(wanted, dtype, native):
    arguments = _schema_arguments(CASES[0], dtype, requires_grad=any(wanted))
    torch.library.opcheck(
        NATIVE.adaptive_loss_fwd.default, (*arguments, True, wanted), rtol=1e-2, atol=1e-2
    )


def test_opcheck_loss_backward(native):
    grads = [torch.randn(3, 4), torch.empty(0), torch.randn(5)]
    for factor in (1.0, 0.5):
        torch.library.opcheck(NATIVE.adaptive_loss_bwd.default, (torch.tensor(factor), grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_nll(dtype, native):
    arguments = _schema_arguments(CASES[0], dtype)
    torch.library.opcheck(NATIVE.adaptive_nll_fwd.default, arguments, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wanted", [[True] * 10, [False, True] * 5], ids=str)
def test_opcheck_nll_backward(wanted, native):
    arguments = _schema_arguments(CASES[0], requires_grad=False)
    nll, lse = NATIVE.adaptive_nll_fwd(*arguments)
    dnll = torch.randn_like(nll)
    torch.library.opcheck(NATIVE.adaptive_nll_bwd.default, (dnll, *arguments, lse, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_where_the_tails_are_one_table(dtype, native):
    """One flag more: their gradients come as one tensor, so that no two outputs share memory."""
    hidden, target, clusters, ignored = _schema_arguments(CASES[4], dtype, requires_grad=False)
    table = torch.randn(40, 12).to(dtype)
    clusters[4], clusters[7] = table[:15], table[15:]
    wanted = [True] * (1 + len(clusters))
    assert is_one_table(clusters, wanted)
    assert not is_one_table(clusters, [*wanted[:-2], False, True])
    wanted.append(True)
    call = (hidden, target, clusters, ignored)
    _, grads = NATIVE.adaptive_loss_fwd(*call, True, wanted)
    assert grads[5].shape == (50, 12)
    assert grads[8].numel() == 0
    torch.library.opcheck(
        NATIVE.adaptive_loss_fwd.default,
        (*call, True, wanted),
        test_utils=("test_schema", "test_faketensor"),
    )
    nll, lse = NATIVE.adaptive_nll_fwd(*call)
    torch.library.opcheck(
        NATIVE.adaptive_nll_bwd.default,
        (torch.ones_like(nll), *call, lse, wanted),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss], ids=lambda op: op.__name__)
@pytest.mark.parametrize("cut", ["split", "slices", "turned round"])
def test_gradients_of_tails_that_are_one_table_are_the_same(op, cut, native):
    case = CASES[4]
    hidden, target, head, tails = case.inputs(torch.float64)
    due_loss = case.call(op, (hidden, target, head, tails), backend="native").sum()
    due = torch.autograd.grad(due_loss, [hidden, head[1], *(tail[1] for tail in tails)])
    weights = [tail[1].detach() for tail in tails]
    order = weights[::-1] if cut == "turned round" else weights
    table = torch.cat(order).requires_grad_()
    first = len(order[0])
    rows = table.split([first, len(table) - first]) if cut == "split" else None
    rows = rows or (table[:first], table[first:])
    rows = rows[::-1] if cut == "turned round" else rows
    parts = [(None, row, tail[2]) for row, tail in zip(rows, tails, strict=True)]
    loss = case.call(op, (hidden, target, head, parts), backend="native").sum()
    grads = torch.autograd.grad(loss, [hidden, head[1], table])
    assert torch.equal(loss, due_loss)
    assert torch.equal(grads[0], due[0])
    assert torch.equal(grads[1], due[1])
    joined = due[2:][::-1] if cut == "turned round" else due[2:]
    assert torch.equal(grads[2], torch.cat(joined))


@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss], ids=lambda op: op.__name__)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(backend, op, compiler):
    """Inductor takes seconds for each piece of the reference, which gets one alone."""
    alone = (backend, compiler) == ("reference", "inductor")
    case = CASES[2 if alone else 0]
    inputs = case.inputs(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: case.call(op, x, backend=backend), fullgraph=True, dynamic=True, backend=compiler
    )
    actual, due = compiled(inputs), case.call(op, inputs, backend=backend)
    torch.testing.assert_close(actual, due)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), _leaves(inputs)),
        torch.autograd.grad(due.sum(), _leaves(inputs)),
    )


def test_compiles_log_prob_and_topk():
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: case.call(adaptive_topk, x, k=5), fullgraph=True)
    torch.testing.assert_close(compiled(inputs), case.call(adaptive_topk, inputs, k=5))
    log_prob = torch.compile(
        lambda x: case.call(adaptive_log_prob, x), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(log_prob(inputs), case.call(adaptive_log_prob, inputs))


@pytest.mark.parametrize("strict", [False, True], ids=["tracing", "strict"])
def test_exports_with_a_dynamic_number_of_tokens(backend, strict):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 12)
            self.tail = torch.nn.Linear(8, 15)

        def forward(self, hidden, target):
            tail = (None, self.tail.weight, self.tail.bias)
            options = {"cutoffs": (11,), "backend": backend}
            return adaptive_nll(hidden, target, self.head.weight, [tail], **options)

    module = Loss()
    N = torch.export.Dim("N", min=2, max=10_000)
    inputs = torch.randn(6, 8), torch.randint(0, 26, (6,))
    program = torch.export.export(module, inputs, dynamic_shapes=({0: N}, {0: N}), strict=strict)
    inputs = torch.randn(19, 8), torch.randint(0, 26, (19,))
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_autocast_casts_hidden_and_weights(backend):
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        nll = case.call(adaptive_nll, inputs, backend=backend)
        nll.sum().backward()
    hidden, target, head, tails = inputs

    def lower(cluster):
        projection, weight, bias = cluster
        return projection.bfloat16(), weight.bfloat16(), bias

    lowered = (hidden.bfloat16(), target, lower(head), list(map(lower, tails)))
    assert nll.dtype == torch.float32
    assert torch.equal(nll, case.call(adaptive_nll, lowered, backend=backend))
    assert all(x.grad.dtype == torch.float32 for x in _leaves(inputs))
