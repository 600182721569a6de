"""Forward passes that leave the training mode of every module as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from txl_kernels.torch_private import modules_of


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Set every module of `model` to evaluation mode, without gradients, for one forward pass.

    Afterwards each module has its own training flag again: layers that the user set to evaluation
    mode (frozen layers) stay so. Flags are set directly, since `nn.Module.train` sets all
    submodules alike.
    """
    training = [module for module in modules_of(model) if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
