"""Names of the tensors that a checkpoint holds: each weight once, the optimizer's by parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

ADAM_KEYS = {"step", "exp_avg", "exp_avg_sq"}


def untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under its first name, and the first name of each further name (tied weights)."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state of each parameter, by `<parameter name>|<key>`."""
    names = parameter_names(model, optimizer)
    return {
        f"{names[i]}|{key}": tensor
        for i, entries in optimizer.state_dict()["state"].items()
        for key, tensor in entries.items()
    }


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def shape_difference(
    theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The first difference in names or shapes between a checkpoint's tensors and a model's."""
    if missing := ours.keys() - theirs.keys():
        return f"it has no {min(missing)!r}"
    if extra := theirs.keys() - ours.keys():
        return f"{min(extra)[:200]!r} is not in this one"
    for name, shape in ours.items():
        if theirs[name] != shape:
            return f"{name} is {list(theirs[name][:8])} there, {list(shape)} here"
    return None


def state_difference(
    theirs: Mapping[str, Mapping[str, Tensor]], model: nn.Module, optimizer: torch.optim.Optimizer
) -> str | None:
    """The first difference between an optimizer's saved state and the state that it would have.

    Args:
        theirs: the saved tensors of each parameter, by their keys.
    """
    parameters = dict(model.named_parameters())
    # Accelerate wraps the optimizer.
    adam = isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.Adam)
    for name, entries in theirs.items():
        if adam and set(entries) != ADAM_KEYS:
            keys = ", ".join(sorted(key[:50] for key in entries)[:5])
            return f"{name} has {keys}, expected {', '.join(sorted(ADAM_KEYS))}"
        for key, tensor in entries.items():
            expected = [] if key == "step" else list(parameters[name].shape)
            if list(tensor.shape) != expected or not tensor.is_floating_point():
                found = f"{tensor.dtype} {list(tensor.shape[:8])}"
                return f"{name}|{key[:50]} is {found}, expected floating point {expected}"
    return None
