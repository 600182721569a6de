"""Documents packed into rows, over several segments: each equals that document alone."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_xl.config import ModelConfig
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL

V, B = 20, 2
SMALL = ModelConfig(
    vocab_size=V,
    cutoffs=(8,),
    n_layer=2,
    d_model=8,
    n_head=2,
    d_head=4,
    d_inner=8,
    mem_len=6,
    dropout=0.0,
    init_std=0.3,
)


def build(backend: str = "auto", **options: Any) -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(dataclasses.replace(SMALL, **options), backend=backend).double()


def losses(
    model: TransformerXL, rows: Tensor, lengths: list[int], document_start: Tensor | None = None
) -> tuple[Tensor, Memory | None]:
    """Nats [B, N] of each row's tokens 1 … N, read in segments of `lengths` tokens; the memory."""
    memory, results = None, [torch.zeros(len(rows), 0, dtype=torch.float64)]
    begin = 0
    for length in lengths:
        segment = slice(begin, begin + length)
        starts = None if document_start is None else document_start[:, segment]
        if starts is not None and not starts.any():
            starts = None  # a segment without the argument continues all documents
        targets = rows[:, 1:][:, segment]
        output = model(rows[:, segment], memory, targets, reduction="none", document_start=starts)
        results.append(output.loss)
        memory, begin = output.memory, begin + length
    return torch.cat(results, dim=1), memory


def pieces(lengths: list[int], first: int, end: int) -> list[int]:
    """The numbers of tokens of `first` … `end` - 1 in each of the segments that have any."""
    borders = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    inside = [min(max(border, first), end) for border in borders]
    parts = [after - before for before, after in itertools.pairwise(inside)]
    return [part for part in parts if part]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@settings(max_examples=4)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=2, max_size=3),
    borders=st.lists(st.sets(st.integers(0, 23), max_size=3), min_size=B, max_size=B),
    mem_len=st.integers(1, 12),
    clamp_len=st.integers(-1, 5),
    same_length=st.booleans(),
    pre_lnorm=st.booleans(),
)
def test_each_document_equals_that_document_alone(
    backend: str, lengths: list[int], borders: list[set[int]], **options: Any
) -> None:
    model = build(backend, **options)
    N = sum(lengths)
    generator = torch.Generator().manual_seed(N)
    rows = torch.randint(0, V, (B, N + 1), generator=generator)
    weights = torch.rand(B, N, dtype=torch.float64, generator=generator)
    document_start = torch.zeros(B, N, dtype=torch.bool)
    for row, starts in zip(document_start, borders, strict=True):
        row[[start for start in starts if start < N]] = True

    packed, memory = losses(model, rows, lengths, document_start)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((packed * weights).sum(), parameters)
    total = torch.zeros((), dtype=torch.float64)
    assert memory is not None
    for b, starts in enumerate(borders):
        begins = sorted({0, *(start for start in starts if start < N)})
        for begin, end in zip(begins, [*begins[1:], N], strict=True):
            document = rows[b : b + 1, begin : end + 1]
            alone, _ = losses(model, document, pieces(lengths, begin, end))
            torch.testing.assert_close(alone[0], packed[b, begin:end])
            total = total + (alone[0] * weights[b, begin:end]).sum()
        assert memory.start[b] == max(memory.length - (N - begins[-1]), 0)
    torch.testing.assert_close(torch.autograd.grad(total, parameters), gradients)


def test_a_row_may_be_reset_and_may_continue_token_by_token() -> None:
    model = build().eval()
    tokens = torch.randint(0, V, (B, 9))
    document_start = torch.zeros(B, 4, dtype=torch.bool)
    document_start[0, 2] = True
    memory = model(tokens[:, :4], document_start=document_start).memory
    memory = memory.reset(torch.tensor([False, True]))
    for t in range(4, 9):
        output = model(tokens[:, t : t + 1], memory)
        memory = output.memory
    for b, begin in ((0, 2), (1, 4)):
        alone = model(tokens[b : b + 1, begin:8])
        expected = model(tokens[b : b + 1, 8:], alone.memory).hidden[0]
        torch.testing.assert_close(output.hidden[b], expected)


def test_wrong_document_starts_are_named() -> None:
    model, tokens = build(), torch.zeros(B, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"document_start: expected bool, got torch.int64"):
        model(tokens, document_start=tokens)
    with pytest.raises(ValueError, match=r"document_start: expected \[2, 3\], got \[2, 2\]"):
        model(tokens, document_start=tokens[:, :2].bool())
    zeros = build(first_memory="zeros")
    with pytest.raises(ValueError, match="document_start: expected None with first_memory 'zeros'"):
        zeros(tokens, document_start=tokens.bool())
