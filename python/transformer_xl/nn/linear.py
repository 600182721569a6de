"""Linear layers of a decoding step: `few_row_linear`, which reads each weight once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformer_xl.nn.layer_weights import int8_rows
from txl_kernels import few_row_linear
from txl_kernels.backends import FEW_ROWS
from txl_kernels.torch_private import has_hooks, is_changed


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; by `txl_kernels.few_row_linear` if that computes the same.

    That is the case for an `nn.Linear` without hooks, in eager mode on the CPU, without gradients,
    for at most 16 rows of `x`. The weight has the dtype of `x`, or it is torchao's, in int8 with
    one scale per row.

    This is a function instead of a subclass of `nn.Linear`, because tools such as
    `quantize_dynamic` search for exactly that class.
    """
    # A parametrised layer has a class of its own.
    if type(layer) is nn.Linear and is_few_rows(x) and _is_unchanged(layer):
        weight, bias = layer.weight, layer.bias
        if type(weight) is nn.Parameter:
            if weight.dtype == x.dtype and weight.is_cpu:
                return few_row_linear(x, weight, bias)
        elif (bias is None or bias.dtype == x.dtype) and (rows := int8_rows(weight)) is not None:
            return few_row_linear(x, rows[0], bias, weight_scale=rows[1])
    out: Tensor = layer(x)
    return out


def _is_unchanged(layer: nn.Module) -> bool:
    """Whether a call of the layer runs the forward of its class alone."""
    return "forward" not in vars(layer) and not has_hooks(layer)


def is_few_rows(x: Tensor) -> bool:
    """Whether `x` [..., K] has at most 16 rows, in an eager call on the CPU without gradients."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.is_cpu
        and x.numel() <= FEW_ROWS * x.shape[-1]
        and not is_changed()
    )


class Sequential(nn.Sequential):
    """`nn.Sequential` whose linear layers are called by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """The result of the last module."""
        for module in self:
            x = linear(module, x)
        return x
