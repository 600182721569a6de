"""Keys and values of Hugging Face's DynamicCache in buffers with room for further tokens.

The library concatenates the whole cache with each new token, which moves three times the bytes that
the attention reads. Here the tensors of the cache are views of buffers, and new tokens are written
after them. Only the tensors that this module stored last are extended in place. All others, such as
those of a cropped, reordered or copied cache, are copied to new buffers first, so no tensor that a
caller keeps ever changes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from txl_kernels.transforms import is_unreadable

# Tokens of room in a new buffer: a quarter of its tokens within these limits.
LEAST_ROOM, MOST_ROOM = 16, 256


@dataclass
class _Buffers:
    """The buffers of one layer, and the views of them that the cache has.

    Args:
        keys, values: [B, Hk, capacity, D].
        end: the number of tokens that are written.
        stored: the cache's keys and values: the last tokens before `end`.
    """

    keys: Tensor
    values: Tensor
    end: int
    stored: tuple[ReferenceType[Tensor], ReferenceType[Tensor]]

    @classmethod
    def copy_of(cls, keys: Tensor, values: Tensor, n_new: int) -> _Buffers:
        """Buffers with the tokens of a cache and room for n_new and more."""
        end = keys.shape[2]
        room = n_new + min(max(end // 4, LEAST_ROOM), MOST_ROOM)
        made = [x.new_empty((*x.shape[:2], end + room, x.shape[3])) for x in (keys, values)]
        for buffer, x in zip(made, (keys, values), strict=True):
            buffer[:, :, :end] = x
        return cls(made[0], made[1], end, (ref(keys), ref(values)))

    def can_append(self, layer: Any, n_new: int) -> bool:
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        is_last = self.stored[0]() is layer.keys and self.stored[1]() is layer.values
        return is_last and self.end + n_new <= self.keys.shape[2]

    def append(self, k: Tensor, v: Tensor, n_before: int) -> tuple[Tensor, Tensor]:
        """Views of the n_before tokens before `end` and the new ones."""
        begin, first, self.end = self.end - n_before, self.end, self.end + k.shape[2]
        for buffer, new in ((self.keys, k), (self.values, v)):
            buffer[:, :, first : self.end] = new
        return self.keys[:, :, begin : self.end], self.values[:, :, begin : self.end]


_buffers: WeakKeyDictionary[Any, _Buffers] = WeakKeyDictionary()


def update(
    cache: Any, k: Tensor, v: Tensor, layer_idx: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """`cache.update(k, v, layer_idx, kwargs=options)`: equal results, and equal tensors in `cache`.

    Args:
        k, v: [B, Hk, T, D], of the new tokens.
    """
    layer = _growing_layer(cache, k, v, layer_idx)
    if layer is None:
        updated: tuple[Tensor, Tensor] = cache.update(k, v, layer_idx, kwargs=options)
        return updated
    T = k.shape[2]
    buffers = _buffers.get(layer)
    if buffers is None or not buffers.can_append(layer, T):
        buffers = _buffers[layer] = _Buffers.copy_of(layer.keys, layer.values, T)
    keys, values = buffers.append(k, v, layer.keys.shape[2])
    layer.keys, layer.values = keys, values
    if layer.is_sliding:
        layer.cumulative_length += T
        kept = slice(-layer.sliding_window + 1, None)  # as the library's own update
        layer.keys, layer.values = keys[:, :, kept], values[:, :, kept]
    buffers.stored = ref(layer.keys), ref(layer.values)
    return keys, values


def _growing_layer(cache: Any, k: Tensor, v: Tensor, layer_idx: int) -> Any:
    """The layer of the cache if it can be extended in place, otherwise None.

    With gradients, the backward pass needs the tensors of earlier steps unchanged.
    """
    if torch.is_grad_enabled() or is_unreadable(k):
        return None
    library: Any = sys.modules["transformers.cache_utils"]
    if type(cache).update is not library.Cache.update or cache.offloading:
        return None
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    growing = (library.DynamicLayer.update, library.DynamicSlidingWindowLayer.update)
    if getattr(type(layer), "update", None) not in growing or not layer.is_initialized:
        return None
    if getattr(layer, "record_past", False) or layer.keys.dim() != 4:
        return None
    for old, new in ((layer.keys, k), (layer.values, v)):
        same = old.shape[:2] == new.shape[:2] and old.shape[3] == new.shape[3]
        if not same or old.dtype != new.dtype or old.device != new.device:
            return None
    return layer
