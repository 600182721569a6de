"""Projected keys and values of the tokens before a segment: the recurrence without gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from transformer_xl.memory import Memory
from transformer_xl.messages import require
from transformer_xl.model_guard import ModelGuard
from transformer_xl.nn import DecoderLayer
from transformer_xl.nn.layer_window import LayerWindow, Placement
from transformer_xl.nn.position import RelativePositions
from transformer_xl.nn.window_buffers import WindowBuffers
from txl_kernels.ops.autocast import autocast_dtype
from txl_kernels.transforms import is_recorded

if TYPE_CHECKING:
    from transformer_xl.model import TransformerXL


class KeyValueWindow:
    """The keys and values that a model attends to before a segment, in one buffer per layer.

    `model(tokens, window)` computes the same as with a `Memory` of hidden states, up to rounding,
    but projects only the segment: it writes the segment's keys and values into the buffers, updates
    the window in place and returns it as `Output.memory`. Projected positions are kept too. A
    buffer has space for `mem_len` tokens and a slack. When it is full, the newest `mem_len` keys
    and values of each row are copied to its start; no other forward pass copies them. If one
    raises, it adds no token, and the next one attends to the same tokens as without it.

    A window belongs to one model with the weights, `mem_len`, `clamp_len` and `same_length` of the
    window's creation. A call raises ValueError after these have changed (`ModelGuard`), with
    gradients enabled and in training mode.

    Rows may be at different positions. The sizes of all tensors in a call depend on B, T and the
    capacity alone, and positions are tensors, which the host reads in `crop`, `save` and `load`
    only.

    `empty` and `load` create a window.

    Size: 2 · n_layer · B · n_head · d_head · (mem_len + slack) numbers for keys and values, and
    n_layer · n_head · d_head for each distance, of which there are mem_len + T or, if fewer,
    clamp_len + 1. While kept keys and values are copied, they exist twice.
    """

    def __init__(self, model: TransformerXL, buffers: WindowBuffers) -> None:
        self._guard = ModelGuard(model)
        self._buffered = buffers
        self._positions: RelativePositions | None = None
        self._r: list[Tensor] = []  # for each layer [1, n_head, R, d_head]
        self._n_queries = 0  # the longest segment that these rows of r serve

    @classmethod
    def empty(
        cls,
        model: TransformerXL,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        slack: int | None = None,
    ) -> KeyValueWindow:
        """A window before the first segment.

        Args:
            model: the model that will read and write it.
            batch_size: B, 0 or more rows.
            dtype: of keys, values and projected positions, and so of the attention. Default:
                autocast's where it is enabled, else that of the embeddings. Queries are converted
                to it, and the output of the attention is converted back.
            slack: tokens between two copies of the kept keys and values, 1 or more; default: the
                larger of 512 and mem_len / 4. A longer segment enlarges the buffers.

        Raises:
            ValueError: a model that no window serves (`unsupported_reason`), a negative
                `batch_size`, a `slack` below 1, a dtype that is not floating.
        """
        if (reason := unsupported_reason(model)) is not None:
            raise ValueError(f"model: expected one that a KeyValueWindow serves, got {reason}")
        if batch_size < 0:
            raise ValueError(f"batch_size: expected 0 or more rows, got {batch_size}")
        if slack is not None and slack < 1:
            raise ValueError(f"slack: expected 1 or more tokens, got {slack}")
        table = model.table()
        dtype = dtype or autocast_dtype(table.device) or table.dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
        capacity = model.mem_len + (slack or _default_slack(model))
        heads = [(2 * layer.dec_attn.n_kv_head, layer.dec_attn.d_head) for layer in _layers(model)]
        buffers = WindowBuffers(
            [(batch_size, n_heads, capacity, d_head) for n_heads, d_head in heads],
            model.mem_len,
            _keys_of_zeros(model) if model.config.first_memory == "zeros" else None,
            dtype=dtype,
            device=table.device,
        )
        return cls(model, buffers)

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return len(self._buffered.position)

    @property
    def capacity(self) -> int:
        """Tokens that a row of a buffer has space for."""
        return self._buffered.capacity

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self._buffered.kv[0].dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of the buffers and of the projected positions."""
        return sum(tensor.nbytes for tensor in (*self._buffered.kv, *self._r))

    def reset(self, rows: Tensor) -> KeyValueWindow:
        """Empty the rows marked in `rows` (bool [B]), which then are as before the first segment.

        Returns the window itself, as `select` and `crop` do. Raises ValueError for another dtype or
        shape.
        """
        self._buffered.reset(rows)
        return self

    def select(self, rows: Tensor) -> KeyValueWindow:
        """Keep the rows with these indices (int64 [B']), in any order; an index may be repeated.

        Raises:
            ValueError: another dtype or shape.
            IndexError: an index outside [0, B); on the CPU (a device assert on CUDA).
        """
        self._buffered.select(rows)
        return self

    def crop(self, n: int | Tensor) -> KeyValueWindow:
        """Forget the newest `n` tokens (int64 [B]: of each row), as if they had not been read.

        The tokens of the latest segment can be forgotten until the next forward pass begins, older
        ones until a buffer is full.

        Raises:
            ValueError: another dtype or shape, a negative number, more tokens than a row has read
                since it was empty or since its last document started, or so many that tokens which
                have been dropped would be needed again. The window stays as it was.
        """
        self._buffered.crop(n)
        return self

    def make_room(self, n_tokens: int, *, segment_len: int = 1) -> KeyValueWindow:
        """Prepare the buffers for calls that are compiled or captured in a CUDA graph.

        Until they have read `n_tokens` tokens of each row, such calls use the same tensors and need
        no Python code between two runs. Call this method again before they read further tokens,
        since they do not check that there is room. Other calls make room for their own tokens.

        Some calls replace these tensors, and a CUDA graph must then be captured again: a
        `make_room` or another call for which the buffers are too small (more tokens than the slack,
        together with those of the last `make_room`), one with longer segments than all before, and
        `select` of another number of rows.

        Args:
            n_tokens: the tokens that all these calls together read in each row, 1 or more.
            segment_len: the largest number of tokens in one call, 1 or more.

        Returns:
            The window itself.

        Raises:
            ValueError: a number below 1, a model in training mode, or one whose weights or lengths
                have changed.
        """
        require("n_tokens", n_tokens, n_tokens >= 1, "1 or more")
        require("segment_len", segment_len, segment_len >= 1, "1 or more")
        with torch.no_grad():
            self._guard.check(self._guard.model)
            self._buffered.reserve(n_tokens)
            self._projected_positions(segment_len)
        return self

    def save(self, path: str | Path) -> None:
        """Write the window to a safetensors file, with the configuration of the model and a
        checksum of its weights, under another name that is then renamed.

        Raises:
            CheckpointError: the disk is full or the place is not writable.
            ValueError: the weights of the model have changed.
        """
        from transformer_xl import window_file  # needs safetensors, which the model does not

        self._guard.check_weights()
        window_file.write(Path(path), self._buffered, self._guard)

    @classmethod
    def load(cls, path: str | Path, model: TransformerXL) -> KeyValueWindow:
        """The window that `save` wrote, in the dtype that it had, on the model's device.

        Raises:
            CheckpointError: there is no such file, it is damaged, or it is of another model, of
                other weights or of another mem_len, clamp_len or same_length.
        """
        from transformer_xl import window_file

        kv, position, start = window_file.read(Path(path), ModelGuard(model))
        B, end = kv[0].shape[0], kv[0].shape[2]
        slack = max(_default_slack(model), end - model.mem_len)
        window = cls.empty(model, B, dtype=kv[0].dtype, slack=slack)
        window._buffered.load(kv, position, start)
        return window

    def begin(
        self, model: TransformerXL, x: Tensor, document_start: Tensor | None = None
    ) -> list[LayerWindow]:
        """The `layer_memory` of each layer for the embedded segment `x` [B, T, d_model].

        The model calls it before its layers, and `advance` after its softmax.
        """
        B, T, _ = x.shape
        self._guard.check(model)
        if self.batch_size != B:
            raise ValueError(f"memory: expected a window of {B} rows, got {self.batch_size}")
        if not self._has_room():
            if is_recorded(x) and not torch.compiler.is_compiling():
                raise ValueError(
                    "memory: expected a call of make_room(n_tokens) before the capture of a CUDA "
                    "graph, for the tokens that the graph will read"
                )
            self._buffered.make_room(T)
        positions = self._projected_positions(T)
        placement = Placement(*self._buffered.place(T, document_start), positions)
        layers = zip(self._buffered.kv, self._r, strict=True)
        return [LayerWindow(kv, r, placement) for kv, r in layers]

    def advance(self, n_tokens: int, document_start: Tensor | None = None) -> KeyValueWindow:
        """Add the segment of `n_tokens` that the layers have written since `begin`."""
        self._buffered.advance(n_tokens, document_start, is_counted=self._has_room())
        return self

    def _has_room(self) -> bool:
        """Whether this call is recorded, and `make_room` has prepared the buffers for it."""
        return self._buffered.is_reserved and is_recorded(self._buffered.position)

    def _projected_positions(self, n_queries: int) -> RelativePositions:
        """The positions of `n_queries` in the buffers; `_r` then has a row for each distance."""
        if self._positions is None or n_queries > self._n_queries:
            positions = self._guard.model.pos_emb(
                n_queries,
                self._buffered.mem_len + n_queries,
                dtype=self._guard.model.table().dtype,
                device=self._buffered.position.device,
            )
            self._r = [
                layer.dec_attn.project_r(positions.embedding).to(self.dtype).contiguous()
                for layer in _layers(self._guard.model)
            ]
            self._positions, self._n_queries = positions, n_queries
        # The last row is distance 0. Queries and keys are counted within the buffer.
        last = self._r[0].shape[2] - 1
        return self._positions._replace(offset=last - (self.capacity - n_queries))


def unsupported_reason(model: TransformerXL) -> str | None:
    """Why no `KeyValueWindow` serves a model; None if one does."""
    attn_type = model.config.attn_type
    if attn_type != 0:
        return f"attn_type {attn_type}"
    # A window projects outside of the layers' forward passes, where `fully_shard` gathers weights.
    library = sys.modules.get("torch.distributed.tensor")
    if library and any(isinstance(each, library.DTensor) for each in model.parameters()):
        return "sharded parameters"
    return None


def empty_memory(
    model: TransformerXL,
    batch_size: int,
    *,
    cached: bool = True,
    cache_dtype: torch.dtype | None = None,
) -> Memory | KeyValueWindow:
    """The memory before the first segment of `batch_size` rows, without gradients.

    It is a `KeyValueWindow`, of `cache_dtype` if given, or a `Memory` if `cached` is False or no
    window serves the model.

    Raises:
        ValueError: a `cache_dtype` where hidden states are kept, or one that is not floating.
    """
    reason = unsupported_reason(model) if cached else "cached=False"
    if reason is None:
        return KeyValueWindow.empty(model, batch_size, dtype=cache_dtype)
    if cache_dtype is not None:
        raise ValueError(
            f"cache_dtype: expected None, since no keys and values are kept ({reason}), "
            f"got {cache_dtype}"
        )
    return model.init_memory(batch_size)


def _default_slack(model: TransformerXL) -> int:
    return max(512, model.mem_len // 4)


def _layers(model: TransformerXL) -> list[DecoderLayer]:
    return [cast(DecoderLayer, layer) for layer in model.layers]


@torch.no_grad()
def _keys_of_zeros(model: TransformerXL) -> list[Tensor]:
    """For each layer the key and value [1, 2 · n_head, 1, d_head] of a hidden state of zeros."""
    zeros = model.table().new_zeros(1, 1, model.config.d_model)
    pairs = [layer.project_kv(zeros) for layer in _layers(model)]
    return [torch.cat([k, v], dim=1) for k, v in pairs if k is not None and v is not None]
