"""The masks of NeMo's Conformer encoders, as ranges of frames.

Whatever the `att_context_style`, a frame attends to one range of frames. The patched encoder
therefore makes int64 [B, Tk, 2], the first frame and the end of the range of each frame, where the
library makes a mask [B, Tk, Tk]. With a cache, the encoder slices the mask or the ranges along the
queries, then passes the slice to its layers. Their attention is in nemo.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transformer_xl.integrations.adapter import Forward, adapter_of

ASR = "nemo.collections.asr"
ATTENTIONS = f"{ASR}.parts.submodules.multi_head_attention"
# Encoders whose forward_internal slices the queries of the masks and passes them to the layers.
ENCODERS = (
    (f"{ASR}.modules.conformer_encoder", "ConformerEncoder"),
    ("nemo.collections.audio.parts.submodules.conformer_unet", "ConformerEncoderUNet"),
)
_STYLES = ("regular", "chunked_limited", "chunked_limited_with_rc")


def ranges_of_frames(
    style: str, context: Sequence[int], T: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[T] each: the first frame that a frame attends to, and the end; also outside [0, T].

    Args:
        style: the `att_context_style`.
        context: left and right context, or left context, size of a chunk and right context; -1
            means unlimited.
    """
    frame = torch.arange(T, device=device)
    left, right = context[0], context[-1]
    if style == "chunked_limited_with_rc" and sum(context) != -3:
        begin = frame // context[1] * context[1]
        return begin - left, begin + context[1] + right
    if style == "chunked_limited" and right != -1:
        size = right + 1
        begin = frame // size * size
        n_chunk = left // size if left >= 0 else 10_000
        return begin - n_chunk * size, begin + size
    first = frame - left if left >= 0 else torch.zeros_like(frame)
    return first, frame + right + 1 if right >= 0 else torch.full_like(frame, T)


def build(original: Forward) -> Forward:
    """`_create_masks` of the encoder, given its own."""

    def masks(
        module: Any,
        att_context_size: Sequence[int],
        padding_length: Tensor,  # [B]
        max_audio_length: int,
        offset: Tensor | None,  # [B]
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        if module.self_attention_model == "rel_pos_local_attn":  # has no mask [B, T, T]
            own: tuple[Tensor, Tensor] = original(
                module, att_context_size, padding_length, max_audio_length, offset, device
            )
            return own
        T = max_audio_length
        frame = torch.arange(T, device=device)
        end = padding_length[:, None].to(frame.dtype)
        start = torch.zeros_like(end) if offset is None else offset[:, None].to(frame.dtype)
        valid = (frame >= start) & (frame < end)  # [B, T]
        first, last = ranges_of_frames(module.att_context_style, att_context_size, T, device)
        ranges = [torch.maximum(first, start), torch.where(valid, torch.minimum(last, end), 0)]
        return ~valid, torch.stack(ranges, dim=-1)

    return masks


def refuse(module: Any) -> str | None:
    model, style = module.self_attention_model, module.att_context_style
    if model not in ("rel_pos", "rel_pos_local_attn"):
        return f"its self_attention_model is {model!r}"
    if style not in _STYLES:
        return f"its att_context_style is {style!r}"
    loaded = [getattr(sys.modules[path], name) for path, name in ENCODERS if path in sys.modules]
    if not any(type(module).forward_internal is known.forward_internal for known in loaded):
        return "its class has another forward_internal than ConformerEncoder"
    return None


def unserved(
    module: Any, att_context_size: Sequence[int], *args: Any, **options: Any
) -> str | None:
    """The ranges are made for all attentions of the layers, NeMo's adapters included."""
    if module.att_context_style == "chunked_limited_with_rc" and len(att_context_size) != 3:
        return "its att_context_size has not three numbers"
    library: Any = sys.modules[ATTENTIONS]
    attentions = [m for m in module.layers.modules() if isinstance(m, library.MultiHeadAttention)]
    if any(adapter_of(attention) is None for attention in attentions):
        return "not all of its attention layers are patched"
    return None
