"""Names of the tensors that a checkpoint holds: each weight once, the optimizer's by parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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


def shape_difference(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str | None:
    """The first difference in names or shapes between a checkpoint's tensors and a model's."""
    if missing := ours.keys() - theirs.keys():
        return f"it has no {min(missing)!r}"
    if extra := theirs.keys() - ours.keys():
        return f"{min(extra)!r} is not in this one"
    for name, tensor in ours.items():
        if theirs[name].shape != tensor.shape:
            return f"{name} is {list(theirs[name].shape)} there, {list(tensor.shape)} here"
    return None
