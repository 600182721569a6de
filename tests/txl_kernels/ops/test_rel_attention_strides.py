"""Inputs whose rows overlap, repeat or are far apart give what contiguous copies of them give."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_attention

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
B, H, T, D = 1, 2, 30, 32


def repeated_row(B, H, T, D, dtype):
    return torch.randn(B, H, 1, D, dtype=dtype).expand(B, H, T, D)


def repeated_heads(B, H, T, D, dtype):
    return torch.randn(B, 1, T, D, dtype=dtype).expand(B, H, T, D)


def one_number(B, H, T, D, dtype):
    return torch.randn(1, 1, 1, 1, dtype=dtype).expand(B, H, T, D)


def overlapping_rows(B, H, T, D, dtype):
    storage = torch.randn(B, H, 3 * T + D, dtype=dtype)
    return storage.as_strided((B, H, T, D), (*storage.stride()[:2], 3, 1))


def heads_between_rows(B, H, T, D, dtype):
    return torch.randn(B, T, H, D, dtype=dtype).transpose(1, 2)


def part_of_wider_rows(B, H, T, D, dtype):
    return torch.randn(B, H, T, 2 * D, dtype=dtype)[..., 1 : D + 1]


def strided_columns(B, H, T, D, dtype):
    return torch.randn(B, H, D, T, dtype=dtype).mT


LAYOUTS = [
    repeated_row,
    repeated_heads,
    one_number,
    overlapping_rows,
    heads_between_rows,
    part_of_wider_rows,
    strided_columns,
]
ALL = ["q", "k", "v", "mem_k", "mem_v", "r"]


NATIVE_AND_TRITON = ["native", pytest.param("triton", marks=pytest.mark.interpreted)]


def output_and_gradients(inputs, backend, weights):
    out = rel_attention(**inputs, causal=True, backend=backend)
    return [out, *torch.autograd.grad(out, list(inputs.values()), weights)]


def assert_layouts_do_not_matter(inputs, backend):
    q, v = inputs["q"], inputs["v"]
    weights = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype)
    given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    copied = {
        name: torch.empty(x.shape, dtype=x.dtype).copy_(x).requires_grad_()
        for name, x in inputs.items()
    }
    results = output_and_gradients(given, backend, weights)
    expected = output_and_gradients(copied, "reference", weights)
    tolerance = 0.05 if q.dtype == torch.bfloat16 else 1e-5
    for label, actual, due in zip(["out", *given], results, expected, strict=True):
        error = (actual.double() - due.double()).abs().max()
        assert error <= tolerance * due.double().abs().max().clamp(min=1), label


def inputs_with(layout, names, n_queries, dtype):
    torch.manual_seed(1)
    lengths = dict.fromkeys(ALL, T) | {"q": n_queries, "r": 2 * T + n_queries}
    return {
        each: (layout if each in names else heads_between_rows)(B, H, length, D, dtype)
        for each, length in lengths.items()
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("n_queries", [1, 5, 70])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_layout_does_not_change_the_result(layout, name, n_queries, dtype, require_backend):
    require_backend("rel_attention", "native", dtype=dtype, needs_grad=True)
    assert_layouts_do_not_matter(inputs_with(layout, [name], n_queries, dtype), "native")


@pytest.mark.interpreted
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_layout_of_all_inputs_does_not_change_the_result(layout, require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)
    assert_layouts_do_not_matter(inputs_with(layout, ALL, 5, torch.float32), "triton")


@pytest.mark.parametrize("row_stride", [0, 1, 7, 2**33])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_stride_of_a_single_key_does_not_matter(dtype, row_stride, require_backend):
    require_backend("rel_attention", "native", dtype=dtype, needs_grad=True)
    torch.manual_seed(2)
    inputs = {name: torch.randn(B, H, 1, D, dtype=dtype) for name in ("k", "v", "mem_k", "mem_v")}
    inputs = {name: x.as_strided(x.shape, (H * D, D, row_stride, 1)) for name, x in inputs.items()}
    inputs["q"], inputs["r"] = (torch.randn(B, H, n, D, dtype=dtype) for n in (5, 6))
    assert_layouts_do_not_matter(inputs, "native")


@pytest.mark.parametrize("backend", NATIVE_AND_TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_an_incoming_gradient_may_repeat_its_rows(dtype, backend, require_backend):
    require_backend("rel_attention", backend, dtype=dtype, needs_grad=True)
    torch.manual_seed(3)
    leaves = [torch.randn(B, H, n, D, dtype=dtype, requires_grad=True) for n in (T, T, T, 2 * T)]
    results, expected = (
        torch.autograd.grad(rel_attention(*leaves, backend=each).sum(), leaves)
        for each in (backend, "reference")
    )
    for actual, due in zip(results, expected, strict=True):
        assert torch.allclose(actual, due, rtol=1e-4, atol=1e-4)
