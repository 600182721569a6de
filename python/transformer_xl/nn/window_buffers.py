"""The buffers of a `KeyValueWindow`: keys and values of all layers, the position of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformer_xl.memory import document_key_start
from transformer_xl.nn.streaming import Options


class WindowBuffers:
    """For each layer a tensor `kv` [B, 2 · n_kv_head, capacity, d_head], keys before values.

    Row b has tokens at start[b] <= j < position[b]; next is position[b]. `start` is negative if
    the first tokens have been dropped. Both are int64 [B], and only `crop` reads them on the host,
    which has a bound `end` of all positions instead. If `is_reserved`, `end` includes the tokens
    that recorded calls add when they run, without the host (`reserve`).

    Args:
        shapes: of each layer, [B, 2 · n_kv_head, capacity, d_head].
        mem_len: tokens before a segment that are attended to.
        zeros: for each layer [1, 2 · n_kv_head, 1, d_head], the key and value of a hidden state of
            zeros, if an empty row has `mem_len` of them.
        dtype, device: of `kv`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int, int]],
        mem_len: int,
        zeros: Sequence[Tensor] | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        B = shapes[0][0]
        with torch.inference_mode(False):  # tensors that may be changed inside and outside of it
            self.kv = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
            self.position = torch.zeros(B, dtype=torch.int64, device=device)
            self.start = torch.zeros(B, dtype=torch.int64, device=device)
        self.mem_len = mem_len
        self.end = 0
        self.is_reserved = False
        self._n_reserved = 0
        self._zeros = None if zeros is None else [zero.to(dtype) for zero in zeros]
        self.reset(torch.ones_like(self.position, dtype=torch.bool))

    @property
    def capacity(self) -> int:
        """Tokens that a row has space for."""
        return self.kv[0].shape[2]

    def reset(self, rows: Tensor) -> None:
        """Empty the rows marked in `rows`, bool [B]."""
        if rows.dtype != torch.bool or rows.shape != self.position.shape:
            expected = f"bool {list(self.position.shape)}"
            raise ValueError(f"rows: expected {expected}, got {rows.dtype} {list(rows.shape)}")
        if self._zeros is None:
            self.start.copy_(torch.where(rows, self.position, self.start))
            return
        for kv, zero in zip(self.kv, self._zeros, strict=True):
            kept = kv[:, :, : self.mem_len]
            torch.where(rows[:, None, None, None], zero, kept, out=kept)
        self.position.masked_fill_(rows, self.mem_len)
        self.start.masked_fill_(rows, 0)
        self.end = max(self.end, self.mem_len + self._n_reserved)

    def select(self, rows: Tensor) -> None:
        """Keep the rows with these indices, int64 [B']."""
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(f"rows: expected int64 [B'], got {rows.dtype} {list(rows.shape)}")
        B = len(self.position)
        if rows.device.type == "cpu" and bool(((rows < 0) | (rows >= B)).any()):
            raise IndexError(f"rows: expected indices in [0, {B}), got {rows.tolist()}")
        position, start = self.position[rows], self.start[rows]
        if len(rows) == B:  # a CUDA graph continues to use the same tensors
            kept = [kv[:, :, : self.end].index_select(0, rows) for kv in self.kv]
            self._keep(self.kv, kept)
            self.position.copy_(position)
            self.start.copy_(start)
            return
        selected = [_zeros_like(kv, len(rows), self.capacity) for kv in self.kv]
        for own, other in zip(self.kv, selected, strict=True):
            torch.index_select(own[:, :, : self.end], 0, rows, out=other[:, :, : self.end])
        with torch.inference_mode(False):
            position, start = position.clone(), start.clone()
        self.kv, self.position, self.start = selected, position, start

    def crop(self, n: int | Tensor) -> None:
        """Forget the newest `n` tokens; int64 [B]: of each row."""
        if isinstance(n, Tensor) and (n.dtype != torch.int64 or n.shape != self.start.shape):
            expected = f"an integer or int64 {list(self.start.shape)}"
            raise ValueError(f"n: expected {expected}, got {n.dtype} {list(n.shape)}")
        position = self.position - n
        if bool((position > self.position).any()):
            raise ValueError(f"n: expected 0 or more tokens, got {n}")
        first = self.start + (0 if self._zeros is None else self.mem_len)
        if bool((position < first).any()):
            most = (self.position - first).tolist()
            raise ValueError(f"n: expected at most the {most} tokens of the rows, got {n}")
        if bool((torch.maximum(self.start, position - self.mem_len) < 0).any()):
            raise ValueError(
                f"n: without the newest {n} tokens, older ones are needed that have been dropped; "
                "with a larger slack they are dropped later"
            )
        self.position.copy_(position)
        self.end = max(position.tolist(), default=0) + self._n_reserved

    def load(self, kv: Sequence[Tensor], position: Tensor, start: Tensor) -> None:
        """Copy the first tokens of other buffers of the same layers and rows to these."""
        self.end = kv[0].shape[2]
        for own, part in zip(self.kv, kv, strict=True):
            own[:, :, : self.end] = part
        self.position.copy_(position)
        self.start.copy_(start)

    def make_room(self, n_tokens: int) -> None:
        """Where the next `n_tokens` do not fit, copy the newest `mem_len` tokens of each row to the
        start of the buffers, which are enlarged if necessary."""
        if self.end + n_tokens <= self.capacity:
            return
        keep = min(self.mem_len, self.end)
        dropped = (self.position - self.mem_len).clamp(min=0)
        rows = self._rows(dropped, keep)
        capacity = max(self.capacity, self.mem_len + self._n_reserved + n_tokens)
        kept = [_rows_of(kv, rows, keep) for kv in self.kv]
        enlarged = capacity > self.capacity
        kv = [_zeros_like(kv, len(kv), capacity) for kv in self.kv] if enlarged else self.kv
        self._keep(kv, kept)
        self.position -= dropped
        self.start -= dropped
        self.end = keep + self._n_reserved

    def reserve(self, n_tokens: int) -> None:
        """Make room for `n_tokens` of recorded calls, and add them to `end`, as `advance` does not.

        They replace the tokens of an earlier call.
        """
        self._n_reserved = 0
        self.make_room(n_tokens)
        self.end += n_tokens
        self.is_reserved, self._n_reserved = True, n_tokens

    def _keep(self, kv: list[Tensor], kept: Sequence[Tensor]) -> None:
        """Make `kv` the buffers, with `kept` as their first tokens.

        This allocates no memory: what can fail has happened before the first buffer changes.
        """
        for own, part in zip(kv, kept, strict=True):
            own[:, :, : part.shape[2]] = part
        self.kv = kv

    def place(self, n_tokens: int, document_start: Tensor | None) -> tuple[Tensor, Options]:
        """The rows of the next `n_tokens` in `kv` (`Placement`), and the keys they attend to."""
        first = self.position
        key_start = torch.maximum(self.start, first - self.mem_len)
        if document_start is not None:
            shape = (len(first), n_tokens)
            key_start = document_key_start(document_start, shape, first[:, None], key_start)
        options: Options = {
            "q_start": first,
            "key_start": key_start,
            "key_lens": first + n_tokens,
        }
        return self._rows(first, n_tokens), options

    def advance(
        self, n_tokens: int, document_start: Tensor | None, *, is_counted: bool = False
    ) -> None:
        """Add the tokens that were written at the rows of `place`.

        `is_counted`: `end` already includes them.
        """
        if document_start is not None:
            t = torch.arange(n_tokens, device=self.start.device)
            start = self.start[:, None]
            starts = torch.where(document_start, self.position[:, None] + t, start)  # [B, T]
            self.start.copy_(torch.cat([start, starts], dim=1).amax(dim=1))  # T may be 0
        self.position += n_tokens
        if not is_counted:
            self.end += n_tokens

    def _rows(self, first: Tensor, n_tokens: int) -> Tensor:
        """The rows of first[b] <= j < first[b] + n_tokens in kv.view(-1, d_head): int64."""
        B, n_heads, capacity, _ = self.kv[0].shape
        t = torch.arange(n_tokens, device=first.device)
        heads = torch.arange(B * n_heads, device=first.device).view(B, n_heads, 1)
        return (heads * capacity + first[:, None, None] + t).flatten()


def _rows_of(kv: Tensor, rows: Tensor, n_tokens: int) -> Tensor:
    """[B, n_heads, n_tokens, d_head]: the rows of kv.view(-1, d_head) with these indices."""
    B, n_heads, _, d_head = kv.shape
    return kv.view(-1, d_head).index_select(0, rows).view(B, n_heads, n_tokens, d_head)


def _zeros_like(kv: Tensor, batch_size: int, capacity: int) -> Tensor:
    with torch.inference_mode(False):
        return kv.new_zeros(batch_size, kv.shape[1], capacity, kv.shape[3])
