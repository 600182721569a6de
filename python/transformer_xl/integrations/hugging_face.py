"""Functions that the adapters of Hugging Face's transformers share: they turn masks into ranges of
keys and decide which calls the kernels serve.

The models make a mask [B, 1, Tq, Tk] by helper functions of their module. The forward of a patched
model is a copy of its own with other helpers, which return the range of keys of each row instead:

    None                                causal or open, by the layer itself
    int64 [2, B] or [2, B, Tq]          key_start and key_lens, counted over all tokens of the text
    bool [B, 1, Tq, Tk]                 True = attend; made where padding is not one range of keys,
                                        and where the values of the given mask cannot be read
                                        (`is_unreadable`)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from transformer_xl.integrations.adapter import Forward, adapter_of
from txl_kernels.transforms import is_unreadable

VERSIONS = ((5, 24), (5, 24))
# The values of attn_implementation whose result the kernels reproduce.
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


def unserved(module: Any, attention_mask: Any, options: Mapping[str, Any]) -> str | None:
    """Why a call of an attention or a model must run the original code, or None.

    Args:
        module: has a `config`.
        options: the other keyword arguments of the call.
    """
    config = module.config
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if implementation not in IMPLEMENTATIONS:
        return f"attn_implementation is {implementation!r}"
    if options.get("output_attentions", getattr(config, "output_attentions", False)):
        return "attention weights are requested"
    if options.get("past_key_values") is not None:
        return "the cache is given by its former name past_key_values"
    if options.get("is_causal", getattr(config, "is_causal", None)) is not None:
        return "is_causal is given"
    if isinstance(attention_mask, Tensor):
        if attention_mask.dim() != 2 and attention_mask.is_floating_point():
            return "the mask has numbers, which are added to the scores"
    elif attention_mask is not None and not isinstance(attention_mask, dict):
        return f"the mask is a {type(attention_mask).__name__}"
    return None


def unserved_model(attentions: list[Any], module: Any, *args: Any, **options: Any) -> str | None:
    """Why a call of a model with these attentions must run the original code, or None.

    The model makes ranges for all its attentions, so all must be patched and serve the call.

    Args:
        args: the input, and the mask where it is given by position.
    """
    if any(adapter_of(attention) is None for attention in attentions):
        return "not all of its attention layers are patched"
    mask = options.get("attention_mask", args[1] if len(args) > 1 else None)
    masks = mask.values() if isinstance(mask, dict) else [mask]
    reasons = (unserved(module, as_bool(mask), options) for mask in masks)
    return next((reason for reason in reasons if reason is not None), None)


def as_bool(mask: Any) -> Any:
    """A mask [B, 1, Tq, Tk] of 0 and the lowest number as bool; every other mask as it is, and all
    masks while their values cannot be read."""
    is_numbers = isinstance(mask, Tensor) and mask.dim() == 4 and mask.is_floating_point()
    if not is_numbers or is_unreadable(mask):
        return mask
    attends = mask == 0
    return attends if bool((attends | (mask == torch.finfo(mask.dtype).min)).all()) else mask


def with_bool_masks(forward: Forward) -> Forward:
    """A forward of a model with the masks that `generate` has made as bool."""

    def changed(module: Any, *args: Any, **options: Any) -> Any:
        masks = options.get("attention_mask")
        if isinstance(masks, dict):
            options["attention_mask"] = {kind: as_bool(mask) for kind, mask in masks.items()}
        elif isinstance(masks, Tensor):
            options["attention_mask"] = as_bool(masks)
        args = tuple(as_bool(x) if isinstance(x, Tensor) else x for x in args)
        return forward(module, *args, **options)

    return changed


def which_keys(mask: Tensor | None, first_key: int, rules: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `rel_attention` that determine which keys a query attends to.

    Args:
        mask: as in the head of this file.
        first_key: the token of key 0.
        rules: the layer's own rules (causal, window); a mask [B, 1, Tq, Tk] contains them already.
    """
    if mask is None:
        return rules
    if mask.dim() == 4 or mask.dtype != torch.int64:  # ranges are int64
        return {"mask": mask != 0}
    return {**rules, "key_start": mask[0] - first_key, "key_lens": mask[1] - first_key}


def ranges_of_padding(mask: Tensor) -> Tensor | None:
    """[2, B]: the first and the end of the tokens that a mask [B, T] keeps; None: not one range."""
    mask = mask.bool()
    T, count = mask.shape[1], mask.sum(1)
    first = mask.int().argmax(1)
    end = torch.where(count > 0, T - mask.flip(1).int().argmax(1), first)
    if bool((end - first == count).all()):
        return torch.stack([first, end])
    return None


def ranges_of_documents(position_ids: Tensor, n_rows: int) -> Tensor:
    """[2, B, T]: the range of each token's document; positions that do not count on start one."""
    position_ids = position_ids.expand(n_rows, -1)
    T = position_ids.shape[1]
    starts = position_ids.diff(prepend=position_ids[:, :1] - 1, dim=1) != 1
    index = torch.arange(T, device=position_ids.device)
    first = torch.where(starts, index, 0).cummax(1).values
    return torch.stack([first, torch.full_like(first, T)])


class _SdpaConfig:
    """A configuration whose masks are bool: those of "eager" are numbers, those of flex blocks."""

    _attn_implementation = "sdpa"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def causal_ranges(create: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces transformers' `create_causal_mask` or `create_sliding_window_causal_mask`."""

    def ranges(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Any,
        cache: Any = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        B, T = inputs_embeds.shape[:2]
        if attention_mask is None:
            if cache is not None or position_ids is None:
                return None
            found = ranges_of_documents(position_ids, B)
            return found if is_unreadable(found) or bool(found[0].any()) else None
        is_padding = attention_mask.dim() == 2 and not is_unreadable(inputs_embeds)
        if is_padding and (cache is not None or attention_mask.shape[1] == T):
            attention_mask = attention_mask.to(inputs_embeds.device)
            # transformers adds False at the end of a mask that is too short for cache and input.
            seen = T if cache is None else cache.get_seq_length() + T
            if bool(attention_mask.all()) and attention_mask.shape[1] >= seen:
                return None
            found_or_none = ranges_of_padding(attention_mask)
            if found_or_none is not None:
                return found_or_none
        return create(
            config=_SdpaConfig(config),
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )

    return ranges


def bidirectional_ranges(create: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces transformers' `create_bidirectional_mask` in an encoder without a cache."""

    def ranges(config: Any, inputs_embeds: Tensor, attention_mask: Any) -> Any:
        if attention_mask is None:
            return None
        T = inputs_embeds.shape[1]
        if attention_mask.shape == (len(inputs_embeds), T) and not is_unreadable(inputs_embeds):
            if bool(attention_mask.all()):
                return None
            found = ranges_of_padding(attention_mask)
            if found is not None:
                return found
        return create(
            config=_SdpaConfig(config), inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )

    return ranges


def with_helpers(
    function: Forward, replace: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]]
) -> Forward:
    """A copy of a function, its decorators included, that calls other helpers.

    Args:
        replace: for each global name that the function calls, a function that returns the
            replacement, given the present value.

    Raises:
        ValueError: the function does not call one of the helpers.
    """
    own = inspect.unwrap(function)
    assert isinstance(own, FunctionType)
    missing = set(replace) - set(own.__code__.co_names)
    if missing:
        raise ValueError(f"{own.__qualname__} does not call {', '.join(sorted(missing))}")
    helpers = {name: make(own.__globals__[name]) for name, make in replace.items()}
    names = {**own.__globals__, **helpers}
    # torch.compile would look the helpers up in the module of this name.
    del names["__name__"]
    return with_body(function, _copy(own, names, own.__closure__))


def with_body(function: Forward, body: Forward) -> Forward:
    """A copy of the decorators of a function around another one."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return body
    assert isinstance(function, FunctionType)
    wrapped = with_body(inner, body)
    cells = tuple(
        CellType(wrapped) if cell.cell_contents is inner else cell
        for cell in function.__closure__ or ()
    )
    made = _copy(function, function.__globals__, cells)
    made.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return made


def _copy(function: FunctionType, names: dict[str, Any], cells: Any) -> FunctionType:
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, dict(function.__dict__)
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    return made
