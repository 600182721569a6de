"""Every int64 as window, chunk, offset or phase gives what exact arithmetic gives."""

from __future__ import annotations

import sys

import pytest
import torch

from txl_kernels import rel_attention, rel_shift

MOST, LEAST = sys.maxsize, -sys.maxsize - 1
B, H, Tq, Tm, D = 1, 2, 5, 7, 8
Tk = Tm + Tq

RULES = [
    {"window": (MOST, None)},
    {"window": (0, MOST)},
    {"window": (MOST, MOST)},
    {"window": (MOST - 1, 2)},
    {"window": (2**62, 2**62 + 1)},
    {"window": (3, 2**61 - 1), "causal": True},
    {"chunk": (16, 2**60)},
    {"chunk": (16, MOST)},
    {"chunk": (3, MOST, -1)},
    {"chunk": (1, MOST)},
    {"chunk": (MOST, 0)},
    {"chunk": (MOST, 0, -3)},
    {"chunk": (MOST, MOST, MOST - 4)},
    {"chunk": (MOST - 1, 0, -6)},
    {"chunk": (2**62, 1, 2**62 - 5)},
    {"chunk": (2**62 + 1, 0, 2**62 - 5)},
    {"chunk": (2**61, 0, -2)},
    {"chunk": (2**32 + 1, 0, 2**32 - 3)},
    {"chunk": (3, 1, LEAST)},
    {"chunk": (3, 1, MOST)},
    {"chunk": (7, 0, -(2**62))},
    {"chunk": (4, MOST, LEAST), "window": (MOST, 1)},
]
OFFSETS = [MOST, MOST - 3, 2**62, 2**32, 2**31, -(2**31), -(2**32), -(2**62), LEAST + 1, LEAST]


@pytest.fixture(params=["reference", "native"])
def backend(request, require_backend):
    require_backend("rel_attention", request.param, needs_grad=True)
    return request.param


def tensors(*, n_queries=Tq, memory=Tm, R=Tk):
    generator = torch.Generator().manual_seed(3)
    segment = (B, H, Tq, D)
    shapes = {"q": (B, H, n_queries, D), "k": segment, "v": segment, "r": (1, H, R, D)}
    if memory:
        shapes |= {"mem_k": (B, H, memory, D), "mem_v": (B, H, memory, D)}
    return {
        name: torch.randn(shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def with_gradients(given, **options):
    """Output and gradients of the call, of every tensor in `given`."""
    out = rel_attention(**given, **options)
    return out, *torch.autograd.grad(out.square().sum(), list(given.values()))


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_keys_are_those_of_exact_arithmetic(backend, rule, exact_mask):
    given = tensors()
    expected = with_gradients(given, mask=exact_mask(Tq, Tk, **rule), backend="reference")
    assert_same(with_gradients(given, **rule, backend=backend), expected)


@pytest.mark.parametrize("rule", [RULES[1], RULES[6], RULES[12], RULES[18]], ids=str)
def test_queries_before_the_first_key_too(backend, rule, exact_mask):
    given = tensors(n_queries=9, memory=0, R=13)
    expected = with_gradients(given, mask=exact_mask(9, Tq, **rule), backend="reference")
    assert_same(with_gradients(given, **rule, backend=backend), expected)


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_clamped_far_offset_reads_the_last_or_the_first_row(backend, offset):
    given = tensors(R=4)
    actual = with_gradients(given, offset=offset, clamp=True, backend=backend)
    row = given["r"][:, :, -1:] if offset > 0 else given["r"][:, :, :1]
    out = rel_attention(**{**given, "r": row}, offset=0, clamp=True, backend="reference")
    expected = out, *torch.autograd.grad(out.square().sum(), list(given.values()))
    assert_same(actual, expected)


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_far_offset_reads_no_row(backend, offset):
    given = tensors(R=4)
    zeros = torch.zeros_like(given["r"])
    expected = with_gradients({**given, "r": zeros.requires_grad_()}, backend="reference")
    actual = with_gradients(given, offset=offset, backend=backend)
    assert_same(actual[:4], expected[:4])  # out, dq, dk, dv
    assert actual[4].count_nonzero() == 0  # dr


@pytest.mark.parametrize("offset", [*OFFSETS, -3, 9])
@pytest.mark.parametrize("n_keys", [1, 6])
def test_the_shift_is_exact(backend, offset, n_keys):
    x = torch.randn(2, Tq, 4, requires_grad=True)
    expected, dx = torch.zeros(2, Tq, n_keys), torch.zeros(2, Tq, 4)
    dout = torch.randn(2, Tq, n_keys)
    for i in range(Tq):
        for j in range(n_keys):
            if 0 <= j - i + offset < 4:
                expected[:, i, j] = x.detach()[:, i, j - i + offset]
                dx[:, i, j - i + offset] = dout[:, i, j]
    out = rel_shift(x, n_keys=n_keys, offset=offset, backend=backend)
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out, x, dout)[0], dx)


def test_compiled_calls_with_changing_integers_are_exact(backend, exact_mask):
    """The compiler makes an integer symbolic once its value has changed."""

    def attend(q, window, chunk, offset):
        options = {"window": window, "chunk": chunk, "offset": offset, "clamp": True}
        return rel_attention(**{**given, "q": q}, **options, backend=backend)

    torch.compiler.reset()
    given = {name: tensor.detach() for name, tensor in tensors(R=4).items()}
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for number, offset in ((3, 2), (4, 3), (MOST, LEAST), (2**61, MOST)):
        rule = {"window": (number, 0), "chunk": (number, number, number - 1)}
        mask = exact_mask(Tq, Tk, **rule)
        near = max(-Tk, min(offset, Tk + Tq))
        expected = rel_attention(**given, mask=mask, offset=near, clamp=True, backend="reference")
        actual = compiled(given["q"], rule["window"], rule["chunk"], offset)
        assert_same([actual], [expected])


@pytest.mark.parametrize("strict", [False, True])
def test_exports_keep_symbolic_integers(backend, strict):
    class Attend(torch.nn.Module):
        def forward(self, q, r):
            T = q.shape[2]
            return rel_attention(
                q, q, q, r, window=(MOST, T), chunk=(2**61, MOST, T), offset=T, backend=backend
            )

    T = torch.export.Dim("T")
    q = torch.randn(B, H, 6, D)
    program = torch.export.export(Attend(), (q, q), dynamic_shapes=({2: T}, {2: T}), strict=strict)
    longer = torch.randn(B, H, 9, D)
    assert_same([program.module()(longer, longer)], [Attend()(longer, longer)])
