"""The attention of Chatterbox's S3Gen, which is CosyVoice's: ESPnet's with a cache.

The score and the mask are those of espnet.py. Without a mask the argument has no element. The cache
[B, H, C, 2 d_k] has keys and values before those of the call; the new one is returned. A table of
Tk rows is not shifted, so such a call runs the original code.

CosyVoice has no package of its own. Its class is found by its parameters, as are copies of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_xl.integrations import espnet
from transformer_xl.integrations.adapter import Adapter, Lookalike, always

# The defaults of the classes.
_NO_MASK, _NO_CACHE = torch.ones((0, 0, 0), dtype=torch.bool), torch.zeros((0, 0, 0, 0))
_NO_TABLE = torch.empty(0)


def attention(
    module: Any,
    query: Tensor,  # [B, Tq, d_model]
    key: Tensor,  # [B, Tq, d_model]
    value: Tensor,  # [B, Tq, d_model]
    mask: Tensor = _NO_MASK,  # [1 or B, 1 or Tq, at least Tk], nonzero = attend
    pos_emb: Tensor = _NO_TABLE,  # [1 or B, 2Tk - 1, d_model]
    cache: Tensor = _NO_CACHE,  # [B, H, C, 2 d_k]
) -> tuple[Tensor, Tensor]:
    """`forward`: the output and the cache with C = Tk."""
    q, k, v = module.forward_qkv(query, key, value)  # each [B, H, Tq, d_k]
    new_cache = torch.cat([k, v], -1)
    if len(cache) > 0:
        new_cache = torch.cat([cache, new_cache], 2)
        k, v = new_cache.chunk(2, -1)
    out = espnet.attend(module, q, k, v, pos_emb, _which_keys(mask, k))
    return module.linear_out(out), new_cache


def _which_keys(mask: Tensor, k: Tensor) -> dict[str, Any]:
    n_rows, Tk = len(k), k.shape[2]
    if mask.shape[2] == 0:
        return {}
    return espnet.which_keys(mask if mask.shape[2] == Tk else mask[:, :, :Tk], n_rows)


def _unserved(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any = _NO_MASK,
    pos_emb: Tensor | None = _NO_TABLE,
    cache: Any = _NO_CACHE,
) -> str | None:
    if pos_emb is None or pos_emb.dim() == 1:
        return "no position embeddings are given"
    if not isinstance(cache, Tensor):
        return "the cache is no tensor"
    Tk = key.shape[1] + (cache.shape[2] if len(cache) > 0 else 0)
    why = espnet.unserved_table(query.shape[1], Tk, pos_emb.shape[1])
    return why or espnet.unserved_mask(mask) or espnet.unserved_hook(module)


def _example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    T, n_cached, (H, d_k) = 5, 3, module.pos_bias_u.shape
    Tk = n_cached + T
    x = torch.randn(2, T, H * d_k)
    mask = torch.arange(Tk) < torch.tensor([[[Tk]], [[6]]])
    cache = torch.randn(2, H, n_cached, 2 * d_k)
    return (x, x, x, mask, torch.randn(1, 2 * Tk - 1, H * d_k), cache), {}


ADAPTERS = (
    Adapter(
        "chatterbox",
        "chatterbox.models.s3gen.transformer.attention.RelPositionMultiHeadedAttention",
        ((0, 1), (0, 1)),
        always(attention),
        _unserved,
        lookalike=Lookalike(espnet.PARAMETERS, _example),
        distribution="chatterbox-tts",
    ),
)
