"""Subsampling convolutions of speech encoders in chunks, so that their memory does not grow with
the length of the audio.

The first convolution of a Parakeet has 256 channels at half the frame rate: 11.8 GB for one hour.
A chunk overlaps its neighbours, and the outputs that its borders change are dropped, so the result
is that of one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_xl.integrations.adapter import Forward

CHUNK = 128  # frames after subsampling, for one row; 1,024 mel frames, 34 MiB in the first layer
OVERLAP = 2  # frames after subsampling: no output depends on more of its neighbours


def build(original: Forward) -> Forward:
    """The forward of a subsampling module, given its own."""

    def forward(
        module: Any,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        padding_cache: Any = None,
    ) -> Tensor:
        if _is_whole(module, input_features, padding_cache):
            options = {} if padding_cache is None else {"padding_cache": padding_cache}
            whole: Tensor = original(module, input_features, attention_mask, **options)
            return whole
        chunk = max(32, CHUNK // len(input_features))
        return in_chunks(original, module, input_features, attention_mask, chunk)

    return forward


def in_chunks(
    original: Forward,
    module: Any,
    features: Tensor,  # [B, T, n_mel]
    mask: Tensor | None,  # [B, T]
    chunk: int,
) -> Tensor:
    """[B, T / factor, d_model]: `original(module, features, mask)`, `chunk` frames at a time."""
    T, factor = features.shape[1], _factor(module)
    if mask is not None:  # the modules use the number of valid frames only
        mask = torch.arange(T, device=mask.device) < mask.sum(-1)[:, None]
    outputs, begin, is_last = [], 0, False
    while not is_last:
        start = max(0, begin - OVERLAP)
        stop = (begin + chunk + OVERLAP) * factor
        is_last = stop >= T
        part = slice(start * factor, stop)
        out = original(module, features[:, part], None if mask is None else mask[:, part])
        out = out[:, begin - start :]
        outputs.append(out if is_last else out[:, :chunk])
        begin += chunk
    return torch.cat(outputs, dim=1)


def unserved(module: Any, *args: Any, **options: Any) -> str | None:
    return None


def _is_whole(module: Any, features: Tensor, padding_cache: Any) -> bool:
    """True for one pass: in a traced program, for a block of a stream, and where the layers must
    keep their outputs for the gradients anyway."""
    if torch.compiler.is_compiling() or padding_cache is not None:
        return True
    return torch.is_grad_enabled() and any(
        x.requires_grad for x in (features, *module.parameters())
    )


def refuse(module: Any) -> str | None:
    first = module.conv_in if hasattr(module, "conv_in") else module.layers[0]
    sizes = (tuple(first.kernel_size), tuple(first.stride))
    if sizes == ((3, 3), (2, 2)):
        return None
    return f"expected kernels of 3 × 3 and strides of 2 × 2, got {sizes[0]} and {sizes[1]}"


def _factor(module: Any) -> int:
    """Frames before subsampling for one frame after it: Nemotron has its first layer outside."""
    n_layer = len(module.layers) + 1 if hasattr(module, "conv_in") else module.num_layers
    return 1 << int(n_layer)
