"""Documents packed into one row attend as each document alone does; the table's exact values."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from txl_kernels import packed_ranges, rel_attention


def one_by_one(borders, T, n_memory):
    """The ranges of tokens in documents, token by token: {i: (start, end)}."""
    ranges = {}
    for n, (begin, end) in enumerate(pairwise(borders)):
        for i in range(begin, min(end, T)):
            start = 0 if n == 0 and n_memory > 0 else begin + n_memory
            ranges[i] = (start, min(end, T) + n_memory)
    return ranges


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=6).map(sorted),
    st.integers(0, 16),
    st.integers(0, 3),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_every_token_has_the_range_of_its_document(borders, T, n_memory, dtype):
    if n_memory > 0:
        borders = [0, *borders]
    start, end = packed_ranges(torch.tensor(borders, dtype=dtype), T, n_memory=n_memory)
    assert start.shape == end.shape == (1, T)
    assert start.dtype == end.dtype == torch.int32
    expected = one_by_one(borders, T, n_memory)
    for i, (first, last) in enumerate(zip(start[0].tolist(), end[0].tolist(), strict=True)):
        if i in expected:
            assert (first, last) == expected[i]
        else:
            assert first == last, "a token outside all documents"
    assert (start.diff() >= 0).all()
    assert (end.diff() >= 0).all()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_packing_equals_each_document_alone(backend, require_backend):
    """Documents of 5, 0, 1 and 7 tokens and 3 tokens of padding, after a memory of 4 keys."""
    uses = ["ranges per query"]
    require_backend("rel_attention", backend, dtype=torch.float64, needs_grad=True, uses=uses)
    borders, T, Tm, B, H, D = [0, 5, 5, 6, 13], 16, 4, 2, 3, 6
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = (random(B, H, T, D) for _ in range(3))
    mem_k, mem_v = (random(B, H, Tm, D) for _ in range(2))
    r = random(1, H, Tm + T, D)  # row m: the distance Tm + T - 1 - m
    inputs = (q, k, v, r, mem_k, mem_v)
    start, end = packed_ranges(torch.tensor(borders), T, n_memory=Tm)
    packed = rel_attention(
        q,
        k,
        v,
        r,
        mem_k=mem_k,
        mem_v=mem_v,
        causal=True,
        key_start=start.expand(B, T),
        key_lens=end.expand(B, T),
        backend=backend,
    )
    alone = []
    for first, last in pairwise(borders):
        memory = {"mem_k": mem_k, "mem_v": mem_v} if first == 0 else {}
        n_keys = last - first + (Tm if first == 0 else 0)
        document = (x[:, :, first:last] for x in (q, k, v))
        alone.append(
            rel_attention(
                *document, r[:, :, r.shape[2] - n_keys :], causal=True, backend=backend, **memory
            )
            if first < last
            else q[:, :, :0]
        )
    expected = torch.cat([*alone, torch.zeros(B, H, 3, D, dtype=torch.float64)], dim=2)
    torch.testing.assert_close(packed, expected)
    dout = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    grads = (torch.autograd.grad(out, inputs, dout) for out in (packed, expected))
    for actual, due in zip(*grads, strict=True):
        torch.testing.assert_close(actual, due)


def test_one_graph_that_reads_no_value():
    """Compiled code does not check the order of the borders, but clamps the ranges, as a GPU."""
    compiled = torch.compile(packed_ranges, fullgraph=True, backend="eager")
    borders = torch.tensor([0, 3, 3, 7])
    for actual, due in zip(compiled(borders, 9), packed_ranges(borders, 9), strict=True):
        assert torch.equal(actual, due)
    for ends in compiled(torch.tensor([-(2**40), 7, 3, 2**40]), 9):
        assert ((ends >= 0) & (ends <= 9)).all()


BAD = [
    ([0, 3], {}, TypeError, "cu_seqlens must be a tensor, got list"),
    (torch.tensor([0.0, 3.0]), {}, TypeError, "cu_seqlens must be torch.int32 or torch.int64"),
    (torch.tensor([[0, 3]]), {}, ValueError, r"cu_seqlens must have shape \[N\+1\], got \[1, 2\]"),
    (torch.tensor([], dtype=torch.int32), {}, ValueError, r"cu_seqlens must have shape"),
    (torch.tensor([0, 3, 2]), {}, ValueError, "must not decrease, got 3 then 2 at index 2"),
    (torch.tensor([1, 3]), {"n_memory": 2}, ValueError, "begin with 0 after a memory, got 1"),
    (torch.tensor([0, 3]), {"n_memory": -1}, ValueError, "n_memory must be at least 0, got -1"),
    (torch.tensor([0, 3]), {"T": -1}, ValueError, "T must be at least 0, got -1"),
    (torch.tensor([0, 3]), {"T": 2.0}, TypeError, "T must be an integer, got 2.0"),
]


@pytest.mark.parametrize(("borders", "options", "error", "message"), BAD)
def test_bad_arguments_are_named(borders, options, error, message):
    with pytest.raises(error, match=f"^packed_ranges: .*{message}"):
        packed_ranges(borders, **{"T": 8, **options})
