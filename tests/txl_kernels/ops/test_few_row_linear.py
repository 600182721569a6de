"""few_row_linear against float64, in all dtypes, at odd sizes; its strides, extremes and errors."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from txl_kernels import BackendUnavailableError, few_row_linear
from txl_kernels.backends.reference import few_row_linear as reference
from txl_kernels.testing import check_budget

DTYPES = [  # of x and of the weight
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.int8),
    (torch.float16, torch.int8),
    (torch.float64, torch.int8),
]
SHAPES = [  # M, N, K
    (1, 1, 1),
    (1, 130, 33),
    (2, 7, 512),
    (3, 4, 16),
    (4, 5, 520),
    (7, 66, 1),
    (8, 9, 1100),
    (13, 64, 64),
    (16, 35, 700),
]


@pytest.fixture
def native(require_backend):
    require_backend("few_row_linear", "native")
    return functools.partial(few_row_linear, backend="native")


@pytest.fixture(params=["reference", "native"])
def linear(request, require_backend):
    require_backend("few_row_linear", request.param)
    return functools.partial(few_row_linear, backend=request.param)


def problem(M, N, K, dtypes=DTYPES[0], seed=0):
    """x, weight, bias, and the scale of an int8 weight or None."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator).to(dtypes[0])
    bias = torch.randn(N, generator=generator).to(dtypes[0])
    if dtypes[1] == torch.int8:
        weight = torch.randint(-128, 128, (N, K), generator=generator).to(torch.int8)
        return x, weight, bias, torch.rand(N, generator=generator) / 100
    return x, torch.randn(N, K, generator=generator).to(dtypes[1]), bias, None


def exact(x, weight, bias, scale):
    values = (
        t if t is None or t.dtype == torch.int8 else t.double() for t in (weight, bias, scale)
    )
    return reference.few_row_linear(x.double(), *values, compute_dtype=torch.float64)


def check(out, x, weight, bias, scale):
    eager = reference.few_row_linear(x, weight, bias, scale, compute_dtype=x.dtype)
    expected = exact(x, weight, bias, scale)
    # The products of an output may cancel to 0.
    absolute = [t if t is None else t.double().abs() for t in (x, weight, bias, scale)]
    magnitude = float(exact(*absolute).max())
    check_budget("out", out, expected, eager, dtype=x.dtype, magnitude=magnitude)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_within_the_error_budget(linear, shape, dtypes):
    x, weight, bias, scale = problem(*shape, dtypes)
    for given_bias in (bias, None):
        out = linear(x, weight, given_bias, weight_scale=scale)
        assert out.dtype == x.dtype
        check(out, x, weight, given_bias, scale)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(1, 40), st.integers(1, 90), st.sampled_from(DTYPES))
def test_any_small_sizes(M, N, K, dtypes):
    x, weight, bias, scale = problem(M, N, K, dtypes, seed=M * N * K)
    check(few_row_linear(x, weight, bias, weight_scale=scale), x, weight, bias, scale)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_a_row_depends_neither_on_other_rows_nor_on_the_number_of_threads(native, dtypes):
    x, weight, bias, scale = problem(16, 403, 1030, dtypes)
    n_threads = torch.get_num_threads()
    together = native(x, weight, bias, weight_scale=scale)
    try:
        torch.set_num_threads(1)
        for M in (1, 2, 5, 11):
            alone = native(x[-M:], weight, bias, weight_scale=scale)
            assert torch.equal(alone, together[-M:])
    finally:
        torch.set_num_threads(n_threads)


def test_permuted_outputs_are_equal_bit_by_bit(native):
    x, weight, bias, _ = problem(5, 37, 91)
    order = torch.randperm(37)
    assert torch.equal(native(x, weight[order], bias[order]), native(x, weight, bias)[:, order])


def test_strides_do_not_matter(linear):
    x, weight, bias, _ = problem(6, 20, 35)
    expected = linear(x, weight, bias)
    close = torch.testing.assert_close
    for strided in (torch.randn(6, 71)[:, ::2][:, :35], torch.randn(35, 6).t()):
        close(linear(strided.copy_(x), weight, bias), expected)
    close(linear(x[:1].expand(6, 35), weight, bias), expected[:1].expand(6, 20))
    # Values before and after the rows of the weight are not used.
    table = torch.full((35, 41), torch.nan)
    for strided in (table[1:21, 3:38], table[:, :20].t(), table[:20, :35]):
        close(linear(x, strided.copy_(weight), bias), expected)
        table.fill_(torch.nan)
    one = linear(x, weight[:1], bias[:1])
    close(linear(x, weight[:1].expand(20, 35), bias[:1].expand(20)), one.expand(6, 20))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 4)], ids=str)
def test_leading_sizes_are_kept(linear, lead):
    x = torch.randn(*lead, 9)
    weight = torch.randn(4, 9)
    out = linear(x, weight)
    assert out.shape == (*lead, 4)
    torch.testing.assert_close(out, F.linear(x, weight))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_sizes(linear, shape):
    x, weight, bias, _ = problem(*shape)
    assert torch.equal(linear(x, weight, bias), bias.expand(shape[0], shape[1]))


def test_nan_and_infinity_stay_in_their_row_and_output(linear):
    x, weight, _, _ = problem(5, 9, 21)
    x[1, 20], weight[7, 3] = torch.nan, torch.inf
    out = linear(x, weight)
    assert out[1].isnan().all()
    others = [0, 2, 3, 4]
    assert torch.equal(out[others, 7], torch.inf * x[others, 3].sign())
    kept = out[others][:, [n for n in range(9) if n != 7]]
    assert kept.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_extremes_are_exact(native, dtype):
    values = torch.tensor([-128, 127, 0, -1], dtype=torch.int8)
    weight = values[:, None].expand(4, 4096).contiguous()
    x = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)[:, None].expand(3, 4096)
    expected = x[:, :1].double() * values.double() * 4096 * 0.25
    out = native(x, weight, weight_scale=torch.full((4,), 0.25))
    assert torch.equal(out, expected.to(dtype))


def test_more_than_16_rows_run_on_the_reference(native):
    x, weight, bias, _ = problem(17, 8, 12)
    assert torch.equal(few_row_linear(x, weight, bias), F.linear(x, weight, bias))
    with pytest.raises(
        BackendUnavailableError, match="native supports up to 16 rows on cpu, not 17"
    ):
        native(x, weight, bias)
    native(x[:16], weight, bias)


def test_sparse_weights_run_on_the_reference(native):
    x, weight, _, _ = problem(3, 8, 12)
    expected = native(x, weight)  # an equal call with a dense weight
    sparse = weight.to_sparse_csr()
    torch.testing.assert_close(few_row_linear(x, sparse), expected)
    with pytest.raises(BackendUnavailableError, match="native does not support sparse tensors"):
        native(x, sparse)


def test_a_repeated_call_is_checked_where_its_result_may_differ(native):
    x, weight, bias, _ = problem(3, 8, 12)
    first = few_row_linear(x, weight, bias)
    assert torch.equal(few_row_linear(x, weight, bias), first)
    assert few_row_linear(x, weight, bias.requires_grad_()).requires_grad
    bias.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert few_row_linear(x, weight, bias).dtype == torch.bfloat16
    _, tangent = torch.func.jvp(lambda x: few_row_linear(x, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, first - bias)
    with pytest.raises(ValueError, match=r"bias must have shape \[8\], got \[7\]"):
        few_row_linear(x, weight, bias[:7])


def test_gradients_come_from_the_reference(native):
    x, weight, bias, _ = problem(3, 8, 12)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = few_row_linear(*leaves)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(F.linear(*leaves), leaves, dout)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, dout), expected)
    with pytest.raises(BackendUnavailableError, match="native has no gradients"):
        native(*leaves)
    with torch.no_grad():
        torch.testing.assert_close(native(*leaves), out)
    out = torch.ops.txl_native.few_row_linear_fwd(*leaves, None)
    with pytest.raises(RuntimeError, match="few_row_linear: this backend has no gradients"):
        out.sum().backward()


def test_opcheck(native):
    operator = torch.ops.txl_native.few_row_linear_fwd.default
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.int8)):
        torch.library.opcheck(operator, problem(3, 5, 6, dtypes))


def test_compiles_and_exports_with_dynamic_sizes(linear):
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return linear(x, weight)

    torch.compiler.reset()
    x, weight, _, _ = problem(3, 8, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(Layer(), fullgraph=True)(x, weight), Layer()(x, weight)
        )
        rows = torch.export.Dim("rows", min=2, max=16)
        outputs = torch.export.Dim("outputs", min=2, max=100)
        program = torch.export.export(
            Layer(), (x, weight), dynamic_shapes=({0: rows}, {0: outputs})
        )
        x, weight, _, _ = problem(7, 31, 12)
        torch.testing.assert_close(program.module()(x, weight), Layer()(x, weight))


def test_autocast_is_that_of_a_linear_layer(linear):
    x, weight, bias, _ = problem(3, 8, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = linear(x, weight, bias)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, F.linear(x, weight, bias))
        x, weight, bias, scale = problem(3, 8, 12, (torch.float32, torch.int8))
        assert linear(x, weight, bias, weight_scale=scale).dtype == torch.bfloat16


def test_vmap_is_a_loop(linear):
    x, weight, bias, _ = problem(8, 5, 12)
    x = x.view(4, 2, 12)
    with torch.no_grad():
        batched = torch.vmap(linear, (0, None, None))(x, weight, bias)
        assert torch.equal(batched, torch.stack([linear(one, weight, bias) for one in x]))


def test_meta_tensors():
    out = few_row_linear(torch.empty(2, 3, 8, device="meta"), torch.empty(5, 8, device="meta"))
    assert out.shape == (2, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(())}, ValueError, r"x must have shape \[..., K\], got \[\]"),
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "x must be torch.float32"),
        ({"weight": None}, TypeError, "weight must be a tensor"),
        (
            {"weight": torch.zeros(3, 5)},
            ValueError,
            r"weight must have shape \[N, 4\], got \[3, 5\]",
        ),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \[N, 4\], got \[4\]"),
        (
            {"weight": torch.zeros(3, 4, dtype=torch.float64)},
            TypeError,
            "weight must be torch.float32 or torch.bfloat16 or torch.float16, got torch.float64",
        ),
        (
            {"weight": torch.zeros(3, 4, dtype=torch.int8)},
            TypeError,
            "weight must be torch.float32 .*got torch.int8",
        ),
        ({"weight_scale": torch.zeros(3)}, TypeError, "weight must be torch.int8"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[3\], got \[4\]"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, TypeError, "bias must be torch.float32"),
        (
            {"weight": torch.zeros(3, 4, dtype=torch.int8), "weight_scale": torch.zeros(3, 1)},
            ValueError,
            r"weight_scale must have shape \[3\], got \[3, 1\]",
        ),
        (
            {"weight": torch.zeros(3, 4, device="meta")},
            ValueError,
            "weight must be on cpu, got meta",
        ),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, BackendUnavailableError, "has no triton backend"),
    ],
)
def test_bad_argument(call, error, message):
    with pytest.raises(error, match=f"few_row_linear: .*{message}"):
        few_row_linear(**{"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), **call})


def test_the_operator_checks_its_arguments(native):
    operator = torch.ops.txl_native.few_row_linear_fwd
    x, weight, bias, _ = problem(2, 3, 4)
    for arguments, message in (
        ((x, weight[:, :3], None, None), "x must have shape .* got"),
        ((x, weight.double(), None, None), "weight must be Float or int8"),
        ((x, weight, bias[:2], None), r"bias must have shape \[3\]"),
        ((x, weight, None, bias[:2]), r"weight_scale must have shape \[3\]"),
        ((x.long(), weight, None, None), "x must be float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"few_row_linear: {message}"):
            operator(*arguments)
