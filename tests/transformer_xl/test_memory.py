"""Memory: the positions that are kept, rows that are reset, and conversion to tensors and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformer_xl.memory import Memory

N_LAYER, B, D_MODEL = 2, 3, 4


def segments(lengths: list[int]) -> list[list[torch.Tensor]]:
    """Per segment and layer [B, T, d_model]; the numbers count tokens."""
    total = sum(lengths)
    stream = torch.arange(total, dtype=torch.float32)[None, :, None].expand(B, total, D_MODEL)
    return [[part + 1000 * n for n in range(N_LAYER)] for part in stream.split(lengths, dim=1)]


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    mem_len=st.integers(0, 12),
)
def test_the_newest_mem_len_positions_are_kept(lengths: list[int], mem_len: int) -> None:
    memory = Memory.empty(N_LAYER, B, D_MODEL)
    for segment in segments(lengths):
        memory = memory.update(segment, mem_len)
    total = sum(lengths)
    expected = torch.arange(max(0, total - mem_len), total, dtype=torch.float32)
    assert memory.length == min(total, mem_len)
    assert torch.equal(memory.hidden[0, 0, :, 0], expected)
    assert torch.equal(memory.hidden[1, 2, :, 3], expected + 1000)
    assert torch.equal(memory.start, torch.zeros(B, dtype=torch.int64))


def test_a_reset_row_starts_where_the_memory_ends_and_refills() -> None:
    first, second, third = segments([4, 2, 3])
    memory = Memory.empty(N_LAYER, B, D_MODEL).update(first, mem_len=5)
    emptied = memory.reset(torch.tensor([False, True, False]))
    assert emptied.start.tolist() == [0, 4, 0]
    assert emptied.hidden[:, 1].eq(0).all()
    assert torch.equal(emptied.hidden[:, 0], memory.hidden[:, 0])
    refilled = emptied.update(second, mem_len=5)
    assert refilled.start.tolist() == [0, 3, 0]
    assert refilled.update(third, mem_len=5).start.tolist() == [0, 0, 0]


def test_a_memory_starts_where_the_rows_last_document_starts() -> None:
    first, second = segments([4, 3])
    memory = Memory.empty(N_LAYER, B, D_MODEL).update(first, mem_len=5)
    document_start = torch.zeros(B, 3, dtype=torch.bool)
    document_start[1] = torch.tensor([True, True, False])
    document_start[2, 0] = True
    memory = memory.update(second, mem_len=5, document_start=document_start)
    assert memory.start.tolist() == [0, 3, 2]
    nothing = memory.update(second, mem_len=0, document_start=document_start)
    assert nothing.start.tolist() == [0, 0, 0]


def test_a_memory_carries_no_gradient_and_keeps_its_dtype() -> None:
    segment = [hidden.to(torch.bfloat16).requires_grad_() for hidden in segments([3])[0]]
    memory = Memory.empty(N_LAYER, B, D_MODEL).update([h * 2 for h in segment], mem_len=5)
    assert not memory.hidden.requires_grad
    assert memory.hidden.dtype == torch.float32


def test_a_memory_survives_its_tensors() -> None:
    memory = Memory.empty(N_LAYER, B, D_MODEL).update(segments([3])[0], mem_len=5)
    tensors = memory.to_tensors()
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    restored = Memory.from_tensors(tensors)
    assert torch.equal(restored.hidden, memory.hidden)
    assert torch.equal(restored.start, memory.start)


def test_bad_input_is_named() -> None:
    memory = Memory.empty(N_LAYER, B, D_MODEL)
    with pytest.raises(AttributeError):
        memory.hidden = memory.hidden  # type: ignore[misc]
    with pytest.raises(ValueError, match="batch_size: expected 0 or more rows, got -1"):
        Memory.empty(N_LAYER, -1, D_MODEL)
    with pytest.raises(ValueError, match=r"rows: expected bool \[3\], got torch.int64 \[3\]"):
        memory.reset(torch.zeros(B, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"missing \['start'\]"):
        Memory.from_tensors({"hidden": memory.hidden})
    with pytest.raises(ValueError, match=r"expected \[n_layer, B, M, d_model\] and \[B\]"):
        Memory.from_tensors({"hidden": memory.hidden, "start": memory.start[:1]})
