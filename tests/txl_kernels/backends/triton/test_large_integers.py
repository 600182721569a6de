"""Triton's 32-bit kernels: every int64 as window, chunk, phase or offset is exact."""

from __future__ import annotations

import sys

import pytest
import torch

from txl_kernels import rel_attention, rel_shift

pytestmark = pytest.mark.interpreted

MOST, LEAST = sys.maxsize, -sys.maxsize - 1
Tq, Tm, D = 5, 7, 8
OPTIONS = [
    {"window": (0, MOST), "chunk": (16, 2**60)},
    {"window": (2**32, 2**31), "chunk": (3, MOST, LEAST)},
    {"chunk": (MOST, 0, -3)},
    {"chunk": (2**62, 1, 2**62 - 5)},
    {"chunk": (3, 1, MOST)},
]


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(3)
    shapes = dict.fromkeys(("q", "k", "v"), (1, 1, Tq, D))
    shapes |= {"r": (1, 1, 4, D), "mem_k": (1, 1, Tm, D), "mem_v": (1, 1, Tm, D)}
    return {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def assert_same_results(given, actual, expected):
    """Compares outputs and gradients of two sets of options."""
    results = []
    for options in (actual, expected):
        out = rel_attention(**given, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(given.values()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", OPTIONS, ids=str)
def test_the_keys_are_those_of_exact_arithmetic(given, rule, exact_mask):
    mask = exact_mask(Tq, Tm + Tq, **rule)
    expected = {"mask": mask, "backend": "reference"}
    assert_same_results(given, {**rule, "backend": "triton"}, expected)


@pytest.mark.parametrize(("offset", "nearer"), [(MOST, 20), (LEAST, -20), (2**32 + 1, 20)])
@pytest.mark.parametrize("clamp", [False, True])
def test_a_far_offset_is_exact(given, offset, nearer, clamp):
    actual = {"offset": offset, "clamp": clamp, "backend": "triton"}
    expected = {"offset": nearer, "clamp": clamp, "backend": "reference"}
    assert_same_results(given, actual, expected)


@pytest.mark.parametrize("offset", [MOST, 2**32 + 1, LEAST])
def test_a_far_shift_is_zero(offset):
    x = torch.randn(2, Tq, 4, requires_grad=True)
    out = rel_shift(x, offset=offset, backend="triton")
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert out.count_nonzero() == 0
    assert dx.count_nonzero() == 0
