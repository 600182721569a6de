"""The ops inside torch.func's transforms, forward-mode differentiation and batches of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import txl_kernels
from txl_kernels import BackendUnavailableError

TARGET = torch.tensor([0, 3, 9, -100, 12])
OPTIONS = {"cutoffs": (8,)}


class Case(NamedTuple):
    """One differentiable argument of a public op: `call(x, backend)`, and x."""

    call: Callable[[Tensor, str], Tensor]
    x: Tensor


def _cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v, r = normal(2, 2, 4, 3), normal(2, 2, 4, 3), normal(2, 2, 4, 3), normal(1, 2, 4, 3)
    hidden, head = normal(5, 6), normal(9, 6)
    tails = [(normal(4, 6), normal(7, 4), normal(7))]
    tables, projections = [normal(8, 4), normal(7, 3)], [normal(5, 4), normal(5, 3)]
    tokens = torch.tensor([[0, 3], [9, 12]])
    masked = {"causal": True, "key_lens": torch.tensor([2, 4]), "softcap": 3.0}
    dropped = {"dropout_p": 0.3, "dropout_seed": torch.tensor(3)}

    def attention(x, backend):
        return txl_kernels.rel_attention(x, k, v, r, **masked, **dropped, backend=backend)

    def softmax(op, **options):
        return lambda x, backend: op(x, *options.values(), head, tails, **OPTIONS, backend=backend)

    def head_weight(x, backend):
        op = txl_kernels.adaptive_loss
        return op(hidden, TARGET, x, tails, **OPTIONS, reduction="sum", backend=backend)

    def embedding(x, backend):
        op = txl_kernels.adaptive_embedding
        return op(tokens, [x, tables[1]], projections, (8,), 2.0, backend=backend)

    return {
        "rel_attention": Case(attention, q),
        "rel_shift": Case(lambda x, backend: txl_kernels.rel_shift(x, backend=backend), q),
        "adaptive_nll": Case(softmax(txl_kernels.adaptive_nll, target=TARGET), hidden),
        "adaptive_loss": Case(softmax(txl_kernels.adaptive_loss, target=TARGET), hidden),
        "adaptive_loss of weights": Case(head_weight, head),
        "adaptive_embedding": Case(embedding, tables[0]),
        "adaptive_log_prob": Case(softmax(txl_kernels.adaptive_log_prob), hidden),
    }


CASES = _cases()
KERNELS = [name for name in CASES if name != "adaptive_log_prob"]
EVERY_CASE = pytest.mark.parametrize("name", CASES)
EVERY_KERNEL = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture(autouse=True)
def native(require_backend):
    for name in KERNELS:
        require_backend(name.split()[0], "native", dtype=torch.float64, needs_grad=True)


def _tangent(call, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x.cos()))).tangent


def _pulled_back(call, x):
    out, pull = vjp(call, x)
    return pull(out.cos())[0]


TRANSFORMS = {
    "grad": lambda call, x: grad(lambda y: call(y).square().sum())(x),
    "vjp": _pulled_back,
    "jacrev": lambda call, x: jacrev(call)(x),
    "jacfwd": lambda call, x: jacfwd(call)(x),
    "jvp": lambda call, x: jvp(call, (x,), (x.cos(),))[1],
    "dual_level": _tangent,
    "vmap of grad": lambda call, x: vmap(grad(lambda y: call(y).sum()))(torch.stack([x, 2 * x])),
}


def _due(transform, call, x):
    """The same result from torch.autograd alone."""
    x = x.clone().requires_grad_()
    if transform == "vmap of grad":
        rows = [torch.autograd.grad(call(factor * x).sum(), x)[0] / factor for factor in (1, 2)]
        return torch.stack(rows)
    out = call(x)
    if transform == "grad":
        return torch.autograd.grad(out.square().sum(), x)[0]
    if transform == "vjp":
        return torch.autograd.grad(out, x, out.detach().cos())[0]
    jacobian = torch.autograd.functional.jacobian(call, x)
    if transform in ("jacrev", "jacfwd"):
        return jacobian
    return torch.tensordot(jacobian, x.detach().cos(), dims=x.ndim)


@pytest.mark.parametrize("transform", TRANSFORMS)
@EVERY_CASE
def test_a_transform_of_the_reference_gives_what_autograd_gives(name, transform):
    case = CASES[name]
    actual = TRANSFORMS[transform](lambda x: case.call(x, "reference"), case.x)
    due = _due(transform, lambda x: case.call(x, "reference"), case.x)
    torch.testing.assert_close(actual, due)


@pytest.mark.parametrize("transform", ["grad", "jvp", "dual_level"])
@EVERY_KERNEL
def test_auto_uses_the_reference_inside_a_transform(name, transform):
    case = CASES[name]
    run = TRANSFORMS[transform]
    auto = run(lambda x: case.call(x, "auto"), case.x)
    torch.testing.assert_close(auto, run(lambda x: case.call(x, "reference"), case.x))


@pytest.mark.parametrize("transform", TRANSFORMS)
@EVERY_KERNEL
def test_a_named_kernel_names_the_reference(name, transform):
    case = CASES[name]
    with pytest.raises(
        BackendUnavailableError, match=r'native runs neither .* backend="reference"'
    ):
        TRANSFORMS[transform](lambda x: case.call(x, "native"), case.x)


@pytest.mark.parametrize("backend", ["reference", "native"])
@EVERY_KERNEL
def test_vmap_equals_a_loop_with_gradients(name, backend):
    case = CASES[name]
    batch = torch.stack([case.x, case.x.cos(), -case.x], dim=1).requires_grad_()
    out = vmap(lambda x: case.call(x, backend), in_dims=1)(batch)
    due = torch.stack([case.call(x, backend) for x in batch.unbind(1)])
    torch.testing.assert_close(out, due)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss.square().sum(), batch)[0] for loss in (out, due))
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_vmap_over_targets_and_in_two_levels(backend):
    hidden = torch.stack([CASES["adaptive_nll"].x] * 2)
    targets = torch.stack([TARGET, TARGET.flip(0)])
    head = CASES["adaptive_loss of weights"].x[:8]

    def call(x, target):
        return txl_kernels.adaptive_nll(x, target, head, [], cutoffs=(), backend=backend)

    pairs = vmap(vmap(call, (0, None)), (None, 0))(hidden, targets % 8)
    torch.testing.assert_close(pairs[1, 0], call(hidden[0], targets[1] % 8))
    with pytest.raises(IndexError, match=r"adaptive_nll: target must be in \[0, 8\), got 9"):
        vmap(call)(hidden, targets)


@pytest.mark.parametrize("backend", ["reference", "native"])
@EVERY_KERNEL
def test_a_batch_of_gradients_works_or_names_the_reference(name, backend):
    case = CASES[name]

    def jacobian(backend, vectorize):
        call = torch.autograd.functional.jacobian
        return call(lambda x: case.call(x, backend), case.x, vectorize=vectorize)

    if backend == "native" and name in ("adaptive_nll", "adaptive_embedding"):
        with pytest.raises(BackendUnavailableError, match=r'batch of .* backend="reference"'):
            jacobian(backend, vectorize=True)
    else:
        due = jacobian("reference", vectorize=False)
        torch.testing.assert_close(jacobian(backend, vectorize=True), due)


@EVERY_KERNEL
def test_vmap_of_a_backward_pass(name):
    case = CASES[name]
    x = case.x.clone().requires_grad_()
    out = case.call(x, "native")
    douts = torch.stack([torch.ones_like(out), torch.zeros_like(out), out.detach().cos()])
    rows = vmap(lambda dout: torch.autograd.grad(out, x, dout)[0])(douts)
    due = [torch.autograd.grad(case.call(x, "native"), x, dout)[0] for dout in douts]
    torch.testing.assert_close(rows, torch.stack(due))


def test_an_operator_called_by_itself_gives_no_silent_zero():
    x = CASES["rel_shift"].x
    with pytest.raises(BackendUnavailableError, match=r'rel_shift: native .* backend="reference"'):
        jvp(lambda y: torch.ops.txl_native.rel_shift_fwd(y, 4, 3), (x,), (x,))


def test_a_transform_inside_a_compiled_function():
    case = CASES["rel_shift"]

    def run(x):
        return TRANSFORMS["grad"](lambda y: case.call(y, "auto"), x)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(case.x), run(case.x))


def test_sparse_gradients_inside_a_transform_raise():
    tokens = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="sparse gradients exist in eager mode only"):
        grad(lambda x: txl_kernels.adaptive_embedding(tokens, [x], [None], sparse=True).sum())(
            torch.randn(4, 3)
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}],
    ids=str,
)
def test_sampling_under_vmap_draws_likely_tokens(options):
    hidden = 50 * torch.eye(6).expand(2, 6, 6)  # each row of the head wins one row of hidden

    def draw(x):
        head, tails = torch.eye(6), [(None, torch.randn(4, 6).mul(0.01), None)]
        return txl_kernels.adaptive_sample(x, head, tails, cutoffs=(5,), **options)

    drawn = vmap(draw, randomness="different")(hidden)
    assert torch.equal(drawn[:, :5], torch.arange(5).expand(2, 5))
    assert bool((drawn[:, 5] >= 5).all())
