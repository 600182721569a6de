"""The forward of Hugging Face's `XLNetModel`, without masks [Tq, Tk, B, 1] of numbers.

Each layer gets two masks, of the content stream h and of the query stream g:

    None                  all keys
    int64 [2, B, Tq]      key_start and key_lens of each query, with attn_type "uni"
    int64 [2, B]          key_start and key_lens of each row, which exclude its padding; a padded
                          token of h also attends to itself
    bool [B, 1, 1 or Tq, Tk]    True = attend: with perm_mask, where padding leaves no single range
                          of keys, and where it cannot be examined, while compiling
                          or capturing a CUDA graph

A token of h always attends to itself, a token of g only where no mask excludes it. Keys of the
memory are never excluded, except by `same_length`.

The function `model` follows the forward of the class in Hugging Face's transformers (Copyright
Google AI, Google Brain, Carnegie Mellon University and the HuggingFace Inc. team, Apache License
2.0).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from transformer_xl.integrations.adapter import adapter_of
from transformer_xl.integrations.hugging_face import ranges_of_padding
from transformer_xl.integrations.position_tables import kept
from txl_kernels.transforms import is_unreadable

MODULE = "transformers.models.xlnet.modeling_xlnet"

Masks = tuple[Tensor | None, Tensor | None]


def model(
    module: Any,
    input_ids: Tensor | None = None,  # [B, T]
    attention_mask: Tensor | None = None,  # [B, T]
    mems: Any = None,  # of each layer [Tm, B, d_model] or None
    perm_mask: Tensor | None = None,  # [B, T, T]
    target_mapping: Tensor | None = None,  # [B, n_predict, T]
    token_type_ids: Tensor | None = None,  # [B, T]
    input_mask: Tensor | None = None,  # [B, T]
    inputs_embeds: Tensor | None = None,  # [B, T, d_model]
    use_mems: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    **options: Any,
) -> Any:
    """The body of `XLNetModel.forward`."""
    config = module.config
    if use_mems is None:
        use_mems = config.use_mems_train if module.training else config.use_mems_eval
    if output_hidden_states is None:
        output_hidden_states = config.output_hidden_states
    if target_mapping is not None:
        target_mapping = target_mapping.permute(1, 2, 0).contiguous()
    h, g = _streams(module, input_ids, inputs_embeds, target_mapping)
    T, B, _ = h.shape
    n_memory = 0 if mems is None or mems[0] is None else len(mems[0])
    both: Masks
    if module.attn_type == "uni":
        both = (_causal_ranges(module, T, n_memory, B, h.device),) * 2
    else:
        both = masks(attention_mask, input_mask, perm_mask, n_memory)
    shared = {
        "attn_mask_h": both[0],
        "attn_mask_g": both[1],
        "r": _position_table(module, T, n_memory + T, B, h.device),
        "seg_mat": None if token_type_ids is None else _segments(token_type_ids, n_memory),
        "target_mapping": target_mapping,
        "output_attentions": False,
    }
    states, new_mems = _layers(module, h, g, mems, shared, keeps_memory=use_mems)
    returned = {
        "last_hidden_state": _batch_first(module.dropout(states[-1])),
        "mems": tuple(new_mems) if use_mems else None,
        "hidden_states": tuple(map(_batch_first, states)) if output_hidden_states else None,
    }
    if config.return_dict if return_dict is None else return_dict:
        library: Any = sys.modules[MODULE]
        return library.XLNetModelOutput(**returned)
    return tuple(x for x in returned.values() if x is not None)


def _streams(
    module: Any, tokens: Tensor | None, embeds: Tensor | None, target_mapping: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """h [T, B, d_model], and g [n_predict, B, d_model] where a target_mapping is given."""
    if tokens is not None:
        embeds = module.word_embedding(tokens.transpose(0, 1).contiguous())
    else:
        assert embeds is not None
        embeds = embeds.transpose(0, 1).contiguous()
    h: Tensor = module.dropout(embeds)
    g: Tensor | None = None
    if target_mapping is not None:
        g = module.dropout(module.mask_emb.expand(len(target_mapping), h.shape[1], -1))
    return h, g


def _layers(
    module: Any,
    h: Tensor,
    g: Tensor | None,
    mems: Any,
    shared: dict[str, Any],
    *,
    keeps_memory: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The states h, or h and g, before each layer and after the last, and the new memory."""
    states: list[Tensor] = [h] if g is None else [h, g]
    new_mems: list[Tensor] = []
    for i, layer in enumerate(module.layer):
        memory = None if mems is None else mems[i]
        if keeps_memory:
            new_mems.append(module.cache_mem(h, memory))
        h, g = layer(h, g, mems=memory, **shared)[:2]
        states += [h] if g is None else [h, g]
    return states, new_mems


def _batch_first(x: Tensor) -> Tensor:
    return x.permute(1, 0, 2).contiguous()


def _causal_ranges(module: Any, T: int, n_memory: int, B: int, device: Any) -> Tensor:
    """[2, B, T]: no later keys; with same_length as many keys for each query, its own included."""
    index = torch.arange(T, device=device)
    first = index if module.same_length else torch.zeros_like(index)
    return torch.stack([first, index + n_memory + 1])[:, None].expand(-1, B, -1)


def masks(
    attention_mask: Tensor | None,
    input_mask: Tensor | None,
    perm_mask: Tensor | None,
    n_memory: int,
) -> Masks:
    """The masks of h and g with attn_type "bi"."""
    if attention_mask is not None:
        input_mask = 1.0 - attention_mask
    excluded = perm_mask
    if input_mask is not None:
        padding = input_mask[:, None]
        excluded = padding if perm_mask is None else padding + perm_mask
    if excluded is None:
        return None, None
    attends = nn.functional.pad(excluded <= 0, (n_memory, 0), value=True)  # [B, 1 or T, Tk]
    if perm_mask is None and not is_unreadable(attends):
        if bool(attends.all()):
            return None, None
        ranges = ranges_of_padding(attends[:, 0])
        if ranges is not None:
            return ranges, ranges
    T, Tk = excluded.shape[2], attends.shape[2]
    key = torch.arange(Tk, device=attends.device)
    is_own = key == key[:T, None] + n_memory
    return (attends | is_own)[:, None], attends[:, None]


def _segments(token_type_ids: Tensor, n_memory: int) -> Tensor:
    """bool [Tk, B, S]: the segment of each key, of the S segments in the batch. Memory is in
    segment 0."""
    ids = nn.functional.pad(token_type_ids.transpose(0, 1), (0, 0, n_memory, 0))
    found: Tensor = ids[..., None] == torch.unique(ids)
    return found


def _position_table(module: Any, T: int, Tk: int, B: int, device: Any) -> Tensor:
    """[R, 1 or B, d_model] from the model's own method; rows of the batch differ with dropout, and
    with `bi_data`, whose second half has the opposite distances."""
    encode = module.relative_positional_encoding
    if module.bi_data or (module.training and module.dropout.p > 0.0):
        table: Tensor = module.dropout(encode(T, Tk, bsz=B, device=device))
        return table
    key = (T, Tk, str(device), module.attn_type, module.clamp_len)
    # The table depends on no parameter; this one has the dtype and the device of the model.
    return kept(module, key, (module.mask_emb,), lambda: encode(T, Tk, device=device))


def unserved(
    module: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    mems: Any = None,
    perm_mask: Any = None,
    target_mapping: Any = None,
    token_type_ids: Any = None,
    input_mask: Any = None,
    inputs_embeds: Any = None,
    use_mems: Any = None,
    output_attentions: bool | None = None,
    *args: Any,
    **options: Any,
) -> str | None:
    """Why a call must run the original code, or None."""
    if any(adapter_of(layer.rel_attn) is None for layer in module.layer):
        return "not all of its attention layers are patched"
    if module.config.output_attentions if output_attentions is None else output_attentions:
        return "attention weights are requested"
    is_one_input = (input_ids is None) != (inputs_embeds is None)
    is_one_mask = attention_mask is None or input_mask is None
    if not is_one_input or not is_one_mask or module.attn_type not in ("bi", "uni"):
        return "the arguments or the attn_type are invalid"
    has_mask = any(mask is not None for mask in (attention_mask, input_mask, perm_mask))
    if module.attn_type == "uni" and has_mask:
        return "attn_type is 'uni' and a mask is given"
    if token_type_ids is not None and is_unreadable(token_type_ids):
        return "the segments cannot be counted while compiling or capturing a CUDA graph"
    return None
