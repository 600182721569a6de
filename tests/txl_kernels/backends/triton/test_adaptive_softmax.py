"""The Triton adaptive softmax against the reference in float64, in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from txl_kernels import adaptive_loss, adaptive_nll
from txl_kernels.testing import check_budget

pytestmark = pytest.mark.interpreted

OPS = {"nll": adaptive_nll, "mean": adaptive_loss, "sum": adaptive_loss}


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("adaptive_nll", "triton", needs_grad=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """`targets`: "any", "head", "last", "two" (a cluster between stays empty), "ignored"."""

    name: str
    sizes: tuple[int, ...] = (10, 15, 25)
    widths: tuple[int, ...] = (12, 6, 3)
    d: int = 12
    N: int = 37
    projected: bool = True
    biased: bool = True
    targets: str = "any"

    def __str__(self):
        return self.name

    def inputs(self, dtype):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape):
            x = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            return x.to(dtype).requires_grad_()

        clusters = []
        for k, (size, width) in enumerate(zip(self.sizes, self.widths, strict=True)):
            V = size + (len(self.sizes) - 1 if k == 0 else 0)
            projection = normal(width, self.d) if self.projected else None
            clusters.append((projection, normal(V, width), normal(V) if self.biased else None))
        first, last = {
            "any": (0, sum(self.sizes)),
            "head": (0, self.sizes[0]),
            "last": (sum(self.sizes[:-1]), sum(self.sizes)),
            "two": (0, sum(self.sizes)),
            "ignored": (0, 1),
        }[self.targets]
        target = torch.randint(first, last, (self.N,), generator=generator)
        if self.targets == "two":
            target[(target >= self.sizes[0]) & (target < sum(self.sizes[:2]))] = 0
        target[-1:] = -100
        if self.targets == "ignored":
            target.fill_(-100)
        return normal(self.N, self.d), target, clusters

    def call(self, what, inputs, backend):
        hidden, target, (head, *tails) = inputs
        cutoffs = [sum(self.sizes[:k]) for k in range(1, len(self.sizes))]
        options = {} if what == "nll" else {"reduction": what}
        return OPS[what](
            hidden,
            target,
            head[1],
            tails,
            cutoffs=cutoffs,
            head_bias=head[2],
            head_proj=head[0],
            backend=backend,
            **options,
        )


CASES = [
    Case("two_tails"),
    Case("no_tails", sizes=(50,), widths=(12,)),
    Case("no_tails_plain", sizes=(10,), widths=(12,), projected=False, biased=False),
    Case("plain", widths=(12, 12, 12), projected=False, biased=False),
    Case("no_projections", widths=(12, 12, 12), projected=False),
    Case("ten_tokens", sizes=(1, 1, 7, 1), widths=(12, 6, 3, 1), N=7),
    Case("one_token", sizes=(10, 40), widths=(12, 6), N=1, targets="last"),
    Case("all_in_head", targets="head"),
    Case("all_in_last", targets="last", N=70),
    Case("ten_tokens_in_last", sizes=(1, 1, 7, 1), widths=(12, 6, 3, 1), targets="last", N=3),
    Case("one_tail_empty", targets="two", N=80),
    Case("all_ignored", targets="ignored"),
    Case("wide", sizes=(20, 40, 70), widths=(33, 33, 33), d=33, N=30, projected=False),
    Case("split", sizes=(20, 40, 230), widths=(40, 16, 4), d=40, N=50),
]
by_name = {case.name: case for case in CASES}


def _leaves(inputs):
    hidden, _, clusters = inputs
    return [hidden, *(x for cluster in clusters for x in cluster if x is not None)]


def _double(inputs):
    def leaf(x):
        return None if x is None else x.detach().double().requires_grad_()

    hidden, target, clusters = inputs
    return leaf(hidden), target, [tuple(map(leaf, cluster)) for cluster in clusters]


def _eager(what, inputs):
    """The formula in one go, in the inputs' own dtype, intermediates rounded."""
    hidden, target, (head, *tails) = inputs

    def log_softmax(cluster):
        projection, weight, bias = cluster
        logits = (hidden if projection is None else hidden @ projection.T) @ weight.T
        return (logits if bias is None else logits + bias).log_softmax(1)

    first = log_softmax(head)
    c0 = first.shape[1] - len(tails)
    parts = [log_softmax(tail) + first[:, c0 + k, None] for k, tail in enumerate(tails)]
    picked = torch.cat([first[:, :c0], *parts], 1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    nll = -picked.masked_fill(target == -100, 0.0)
    if what == "nll":
        return nll
    return nll.sum() / (max(int((target >= 0).sum()), 1) if what == "mean" else 1)


def _with_gradients(value, leaves, dout):
    dout = dout[: value.numel()].reshape(value.shape).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, dout)]


def _run(case, what, inputs, backend="triton"):
    dout = torch.randn(max(case.N, 1), generator=torch.Generator().manual_seed(5))
    return _with_gradients(case.call(what, inputs, backend), _leaves(inputs), dout)


def _check(case, what, dtype):
    inputs = case.inputs(dtype)
    exact = _double(inputs)
    dout = torch.randn(max(case.N, 1), generator=torch.Generator().manual_seed(5))
    actual = _run(case, what, inputs)
    eager = _with_gradients(_eager(what, inputs), _leaves(inputs), dout)
    due = _with_gradients(_eager(what, exact), _leaves(exact), dout)
    assert actual[0].dtype == torch.float32
    largest = max(float(x.detach().abs().max()) for x in _leaves(exact))
    counted = max(int((inputs[1] >= 0).sum()), 1) if what == "mean" else 1
    magnitude = float(dout.abs().max()) / counted * largest
    check_budget(what, actual[0], due[0], eager[0], dtype=dtype)
    for n, tensors in enumerate(zip(actual[1:], due[1:], eager[1:], strict=True)):
        grad = f"gradient {n}"
        check_budget(grad, *tensors, dtype=dtype, magnitude=magnitude, is_sum=True)
    return actual


PAIRS = [("nll", torch.float32, case) for case in CASES]
PAIRS += [("mean", torch.float16, case) for case in CASES]
PAIRS += [("nll", torch.float16, case) for case in CASES[:3]]
PAIRS += [("mean", torch.float32, case) for case in CASES[:3]]


@pytest.mark.parametrize(("what", "dtype", "case"), PAIRS, ids=str)
def test_value_and_gradients_are_within_the_error_budget(what, dtype, case):
    _check(case, what, dtype)


@pytest.mark.parametrize("what", ["nll", "mean", "sum"])
@pytest.mark.parametrize("by_columns", [False, True], ids=["by_tokens", "by_columns"])
def test_blocks_of_the_head_change_nothing(what, by_columns, monkeypatch):
    from txl_kernels.backends.triton import adaptive_softmax_head as heads

    monkeypatch.setattr(heads, "block_of_columns", lambda N, n: 16)
    monkeypatch.setattr(heads, "block_of_tokens", lambda N, n: None if by_columns else 8)
    _check(Case("", sizes=(50, 15, 25)), what, torch.float32)
    if what == "mean":
        _check(Case("", sizes=(50, 15, 25), biased=False), what, torch.float16)


def test_a_block_of_logits_is_bounded():
    from txl_kernels.backends.triton import adaptive_softmax_head as heads

    for N in (1, 300, 9000, 200_000):
        for V in (10, 20_003, 60_003, 267_735):
            columns, tokens = heads.block_of_columns(N, V), heads.block_of_tokens(N, V)
            assert columns <= V
            assert N * columns <= max(heads.MAX_LOGITS, 256 * N)
            assert tokens is None or (tokens <= N and tokens * V <= heads.MAX_LOGITS)


@pytest.mark.parametrize("what", ["nll", "mean"])
@pytest.mark.parametrize("name", ["two_tails", "split"])
def test_no_result_depends_on_the_order_of_programs(what, name, monkeypatch):
    from triton.runtime import interpreter

    case = by_name[name]
    first = _run(case, what, case.inputs(torch.float32))
    builder = interpreter.interpreter_builder
    set_index = builder.set_grid_idx

    def backwards(*index):
        set_index(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    again = _run(case, what, case.inputs(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("what", ["nll", "mean"])
@pytest.mark.parametrize("name", ["two_tails", "one_tail_empty", "all_ignored", "plain"])
def test_what_memory_held_before_does_not_matter(what, name, poison):
    case = by_name[name]
    first = _run(case, what, case.inputs(torch.float32))
    with poison():
        again = _run(case, what, case.inputs(torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("what", ["nll", "mean"])
def test_clusters_without_targets_get_zero_gradients(what):
    case = by_name["all_in_head"]
    inputs = case.inputs(torch.float32)
    case.call(what, inputs, "triton").sum().backward()
    assert all(not x.grad.any() for tail in inputs[2][1:] for x in tail)
    assert all(x.grad.any() for x in inputs[2][0])


@pytest.mark.parametrize("what", ["nll", "mean", "sum"])
def test_no_tokens(what):
    case = Case("", N=0)
    value, *grads = _run(case, what, case.inputs(torch.float32))
    assert value.shape == ((0,) if what == "nll" else ())
    assert not value.any()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("what", ["nll", "mean"])
def test_only_wanted_gradients_are_formed(what):
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    due = dict(enumerate(_run(case, what, inputs)[1:]))
    dout = torch.randn(case.N, generator=torch.Generator().manual_seed(5))
    for n, wanted in list(enumerate(_leaves(inputs)))[:9:4]:
        for leaf in _leaves(inputs):
            leaf.requires_grad_(leaf is wanted)
        value = case.call(what, inputs, "triton")
        _, grad = _with_gradients(value, [wanted], dout)
        torch.testing.assert_close(grad, due[n], rtol=0, atol=0)
    for leaf in _leaves(inputs):
        leaf.requires_grad_(False)
    assert torch.equal(case.call(what, inputs, "triton"), value)


def test_small_gradients_of_a_float16_mean_survive():
    case = Case("", N=64, sizes=(10,), widths=(4,), d=4, projected=False)
    inputs = case.inputs(torch.float16)
    with torch.no_grad():
        inputs[0].mul_(2.0**-13)
    due = _double(inputs)
    # As a gradient scaler does.
    (case.call("mean", inputs, "triton") * 2.0**15).backward()
    (case.call("mean", due, "reference") * 2.0**15).backward()
    for actual, exact in zip(_leaves(inputs), _leaves(due), strict=True):
        error = (actual.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < 2e-3


@pytest.mark.parametrize("wrong", [-1, 50])
@pytest.mark.parametrize("what", ["nll", "mean"])
def test_a_target_out_of_range(what, wrong):
    hidden, target, clusters = CASES[0].inputs(torch.float32)
    target[3] = wrong
    with pytest.raises(IndexError, match=r"target must be in \[0, 50\)"):
        CASES[0].call(what, (hidden, target, clusters), "triton")


@pytest.mark.parametrize("what", ["nll", "mean"])
def test_strides_do_not_matter(what):
    case = CASES[0]
    hidden, target, clusters = inputs = case.inputs(torch.float32)
    due = _run(case, what, inputs)

    def strided(x):
        if x is None:
            return None
        wide = x.detach().new_zeros(*x.shape, 2)
        wide[..., 0] = x.detach()
        return wide[..., 0].requires_grad_()

    inputs = (
        hidden.detach().T.contiguous().T.requires_grad_(),
        torch.stack([target, target], 1)[:, 0],
        [tuple(map(strided, cluster)) for cluster in clusters],
    )
    actual = _run(case, what, inputs)
    for a, b in zip(actual, due, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["nll", "mean"])
def test_compiles_as_one_graph(what):
    torch.compiler.reset()
    case = CASES[0]
    inputs = case.inputs(torch.float32)
    compiled = torch.compile(
        lambda hidden: case.call(what, (hidden, *inputs[1:]), "triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    due = _run(case, what, inputs)
    dout = torch.randn(case.N, generator=torch.Generator().manual_seed(5))
    actual = _with_gradients(compiled(inputs[0]), _leaves(inputs), dout)
    for a, b in zip(actual, due, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=5)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["any", "head", "last", "ignored"]),
    st.sampled_from(["nll", "mean"]),
)
def test_any_shape(sizes, d, N, projected, biased, targets, what):
    widths = tuple(max(1, d // 2**k) if projected else d for k in range(len(sizes)))
    _check(Case("", tuple(sizes), widths, d, N, projected, biased, targets), what, torch.float32)


def test_the_operators_keep_their_promises_to_torch():
    hidden, target, clusters = CASES[0].inputs(torch.float32)
    flat = [x.detach() for cluster in clusters for x in cluster]
    needed = [True] * (1 + len(flat))
    call = (hidden.detach(), target, flat, -100)
    ops = torch.ops.txl_triton
    nll, lse = ops.adaptive_nll_fwd(*call)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator, args in (
        (ops.adaptive_nll_fwd, call),
        (ops.adaptive_nll_bwd, (torch.ones_like(nll), *call, lse, needed)),
        (ops.adaptive_loss_fwd, (*call, True, needed)),
    ):
        torch.library.opcheck(operator.default, args, test_utils=checks)
