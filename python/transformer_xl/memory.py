"""The recurrence: hidden states of the tokens before a segment, per layer, without gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """The hidden states that a model attends to before a segment; every method returns a new one.

    Args:
        hidden: [n_layer, B, M, d_model], the input of each layer at the last M tokens, newest
            last. Carries no gradient.
        start: int64 [B], the first position of each row's memory, which is not before the row's
            last document; M: the row's memory is empty.
    """

    hidden: Tensor
    start: Tensor

    @classmethod
    def empty(
        cls,
        n_layer: int,
        batch_size: int,
        d_model: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """A memory without content: `length` positions of zeros, all of them before `start`."""
        if batch_size < 0:
            raise ValueError(f"batch_size: expected 0 or more rows, got {batch_size}")
        hidden = torch.zeros(n_layer, batch_size, length, d_model, dtype=dtype, device=device)
        start = torch.full((batch_size,), length, dtype=torch.int64, device=device)
        return cls(hidden, start)

    @property
    def length(self) -> int:
        """M, in tokens."""
        return self.hidden.shape[2]

    def update(
        self,
        new_hidden: Sequence[Tensor],
        mem_len: int,
        *,
        document_start: Tensor | None = None,
    ) -> Memory:
        """The last `mem_len` positions of this memory followed by a segment's.

        Args:
            new_hidden: per layer [B, T, d_model], its input over the segment.
            mem_len: the most positions kept, in tokens.
            document_start: bool [B, T], True at the first token of a document; the result starts at
                the last of these.
        """
        new = torch.stack([hidden.detach().to(self.hidden.dtype) for hidden in new_hidden])
        both = torch.cat([self.hidden.detach(), new], dim=2)  # [n_layer, B, M + T, d_model]
        total = both.shape[2]
        dropped = bounded(total - mem_len, at_least=0)
        # An index, because torch.export fixes whether a slice of symbolic length is empty.
        newest = torch.arange(dropped, total, device=both.device)
        start = self.start
        if document_start is not None:
            starts = document_key_start(document_start, new.shape[1:3], self.length, start)
            start = torch.cat([start[:, None], starts], dim=1).amax(dim=1)  # T may be 0
        return Memory(both[:, :, newest], (start - dropped).clamp(min=0))

    def reset(self, rows: Tensor) -> Memory:
        """This memory with the rows marked in `rows` (bool [B]) emptied, their states zeroed."""
        if rows.dtype != torch.bool or rows.shape != self.start.shape:
            expected = f"bool {list(self.start.shape)}"
            raise ValueError(f"rows: expected {expected}, got {rows.dtype} {list(rows.shape)}")
        hidden = self.hidden.masked_fill(rows[None, :, None, None], 0)
        return Memory(hidden, self.start.masked_fill(rows, self.length))

    def to_tensors(self) -> dict[str, Tensor]:
        """The memory as named tensors, for a checkpoint."""
        return self._asdict()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Memory:
        """The inverse of `to_tensors`; ValueError if a name is missing or a shape is wrong."""
        missing = set(cls._fields) - set(tensors)
        if missing:
            raise ValueError(f"tensors: expected hidden and start, missing {sorted(missing)}")
        memory = cls(tensors["hidden"], tensors["start"])
        if memory.hidden.dim() != 4 or memory.start.shape != memory.hidden.shape[1:2]:
            shapes = [list(tensor.shape) for tensor in memory]
            raise ValueError(f"tensors: expected [n_layer, B, M, d_model] and [B], got {shapes}")
        return memory


def document_key_start(
    document_start: Tensor,
    shape: Sequence[int],
    n_memory: int | Tensor,
    key_start: Tensor | None,
) -> Tensor:
    """The first key of each token, at the start of its document or later: int64 [B, T].

    Args:
        document_start: bool [B, T], True at the first token of a document. Tokens before the first
            True of a row continue the document in the memory.
        shape: (B, T), of the segment.
        n_memory: keys before the segment; int64 [B, 1] where the rows have different numbers.
        key_start: int32 or int64 [B] or [B, T], a further limit in [memory; segment]; None: 0.

    Raises:
        TypeError, ValueError: `document_start` of another type, dtype or shape.
    """
    if document_start.dtype != torch.bool:
        raise TypeError(f"document_start: expected bool, got {document_start.dtype}")
    if document_start.shape != torch.Size(shape):
        expected, got = list(shape), list(document_start.shape)
        raise ValueError(f"document_start: expected {expected}, got {got}")
    position = n_memory + torch.arange(shape[1], device=document_start.device)
    first = torch.where(document_start, position, 0).cummax(dim=1).values
    if key_start is None:
        return first
    return torch.maximum(first, key_start[:, None] if key_start.dim() == 1 else key_start)


def bounded(length: int, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """`length` within the given bounds; a symbolic or traced length stays one."""
    if at_least is None and at_most is None:
        return length
    if isinstance(length, Tensor):  # a size inside torch.jit.trace
        return length.clamp(min=at_least, max=at_most)
    # torch 2.11's compiler accepts no torch.sym_max of known lengths; Python's max of a symbolic
    # length would fix, under torch.export, which of the two is larger.
    symbolic = isinstance(length, torch.SymInt)
    largest: Callable[[int, int], int] = torch.sym_max if symbolic else max
    smallest: Callable[[int, int], int] = torch.sym_min if symbolic else min
    if at_least is not None:
        length = largest(length, at_least)
    return length if at_most is None else smallest(length, at_most)
