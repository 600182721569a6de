"""The weight that a layer would use in a call, for code that reads weights and calls no layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.weak import WeakIdKeyDictionary

from txl_kernels.torch_private import changes, forward_hooks, forward_pre_hooks, has_hooks

# The hooks with which `torch.nn.utils` computes a weight before each call of a layer.
_WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of `layer` computes `F.linear` with its weight and bias and nothing else.

    False for wrappers (LoRA), quantised layers, parametrisations and layers with a hook, global
    hooks of `torch.nn.modules.module` included.
    """
    return (
        _runs(layer, nn.Linear)
        and not is_parametrized(layer)
        and not is_quantised(layer.weight)
        and not has_hooks(layer)
    )


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The int8 values [N, K] and scales [N] of a weight of torchao that has one scale per row.

    None for all other tensors, for zero points that are not 0 and where activations are scaled or
    quantised as well.
    """
    kind = type(weight)
    if kind.__name__ != "Int8Tensor" or not kind.__module__.startswith("torchao."):
        return None
    parts: Any = weight
    values, scale, zero_point = parts.qdata, parts.scale, parts.zero_point
    if parts.act_quant_kwargs is not None or parts.act_pre_scale is not None:
        return None
    if values.ndim != 2 or scale.shape != (len(values), 1):
        return None
    if zero_point is not None and not _is_zero(zero_point):
        return None
    return values, scale[:, 0]


_zeros: Any = WeakIdKeyDictionary()  # zero points of 0, and how often each has changed


def _is_zero(tensor: Tensor) -> bool:
    """Whether all elements are 0. A tensor that has not changed since is not read again."""
    if tensor.is_inference():  # its changes are not counted
        return not tensor.any()
    if _zeros.get(tensor) == changes(tensor):
        return True
    if tensor.any():
        return False
    _zeros[tensor] = changes(tensor)
    return True


def weight_and_bias(
    owner: nn.Module, name: str, layer: Any, *, trained: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that a `nn.Linear` or `nn.Embedding` would use in a call now.

    The adaptive kernels read the weights and never call the layer. Weights of
    `torch.nn.utils.prune`, `weight_norm`, `spectral_norm` and parametrisations are computed anew,
    quantised ones are dequantised. Backward hooks on the layer and global hooks are not called:
    the kernels compute neither the output of the layer nor its gradient.

    Args:
        owner: the module that uses the layer, for messages.
        name: the layer's name in `owner`, for messages.
        layer: the layer.
        trained: whether a backward pass through this call trains the model.

    Raises:
        ValueError: the layer is wrapped (LoRA) or has a forward hook, or its weight is quantised
            and would be trained.
    """
    check_read(owner, name, layer, nn.Linear, nn.Embedding)
    if _is_dynamic(layer):  # its weight and bias are methods
        return layer.weight().dequantize(), layer.bias()
    update_weights(layer)
    weight = dense(f"{_label(owner, name)}.weight", layer.weight, trained=trained)
    return weight, getattr(layer, "bias", None)


def check_read(owner: nn.Module, name: str, layer: nn.Module, *kinds: type[nn.Module]) -> None:
    """Checks that reading the weights of `layer` computes the same as calling it.

    Raises:
        ValueError: a forward hook on it, or a `forward` that is not that of one of `kinds`.
    """
    hooks = [*forward_pre_hooks(layer), *forward_hooks(layer)]
    if not all(isinstance(hook, _WEIGHT_HOOKS) for hook in hooks):
        found = "a forward hook on it"
    elif "forward" in vars(layer):
        found = "a replaced forward method"
    elif not _is_dynamic(layer) and not any(_runs(layer, kind) for kind in kinds):
        found = f"a {type(layer).__module__}.{type(layer).__qualname__}"
    else:
        return
    expected = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
    raise ValueError(
        f"{_label(owner, name)}: expected a plain {expected}, because the kernels read its weights "
        f"and do not call it, got {found}; merge the adapter into the layer (peft: "
        "merge_and_unload) or remove the hook"
    )


def projections_of(owner: nn.Module, name: str, *, trained: bool = False) -> list[Tensor | None]:
    """The matrices in the `nn.ParameterList` called `name`, each as `weight_and_bias` reads one."""
    parameters = getattr(owner, name)
    update_weights(parameters)
    label = _label(owner, name)
    return [
        None if matrix is None else dense(f"{label}.{k}", matrix, trained=trained)
        for k, matrix in enumerate(parameters)
    ]


def update_weights(module: nn.Module) -> None:
    """Runs the hooks of `torch.nn.utils` that compute a module's weights before its `forward`.

    torch runs them in `module(…)` only: other methods, and containers that are never called, must
    call this function before they read a weight.
    """
    for hook in forward_pre_hooks(module):
        if isinstance(hook, _WEIGHT_HOOKS):
            hook(module, ())


def dense(label: str, weight: Tensor, *, trained: bool = False) -> Tensor:
    """`weight`, dequantised if it is a quantised tensor subclass such as torchao's.

    Raises:
        ValueError: a quantised weight that would be trained: one that requires a gradient, or any
            if `trained`.
    """
    if not is_quantised(weight):
        return weight
    if torch.is_grad_enabled() and (trained or weight.requires_grad):
        raise ValueError(
            f"{label}: expected a floating-point weight in training, got a quantised "
            f"{type(weight).__name__}; use it in eval() or under torch.no_grad(), or leave this "
            "layer out of the quantisation"
        )
    return weight.dequantize()


def _label(owner: nn.Module, name: str) -> str:
    return f"{type(owner).__name__}: {name}"


def _is_dynamic(layer: nn.Module) -> bool:
    """Whether the layer is a result of `torch.ao.quantization.quantize_dynamic`."""
    return type(layer).__module__.startswith("torch.ao.nn.quantized.dynamic")


def _runs(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `layer.forward` is the method of `kind`; a subclass or a patch may replace it."""
    return type(layer).forward is kind.forward and "forward" not in vars(layer)


def is_quantised(weight: Any) -> bool:
    """Whether the tensor's class has a `dequantize` of its own, as torchao's have."""
    if type(weight) in (Tensor, nn.Parameter):
        return False
    return type(weight).dequantize is not Tensor.dequantize
