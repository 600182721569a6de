"""Layers as other libraries make them: a LoRA wrapper as in peft, an int8 weight as in torchao."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Lora(nn.Module):
    """Adds B A x to the result of `base_layer`; `weight` and `bias` are those of `base_layer`."""

    def __init__(self, base_layer: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        n_out, n_in = base_layer.weight.shape
        self.lora_A = nn.Linear(n_in, rank, bias=False).to(base_layer.weight.dtype)
        self.lora_B = nn.Linear(rank, n_out, bias=False).to(base_layer.weight.dtype)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merged(self) -> nn.Linear:
        """One layer that computes the same."""
        n_out, n_in = self.weight.shape
        layer = nn.Linear(n_in, n_out, bias=self.bias is not None).to(self.weight.dtype)
        layer.weight = nn.Parameter(self.weight + self.lora_B.weight @ self.lora_A.weight)
        if self.bias is not None:
            layer.bias = self.bias
        return layer


class Int8Weight(Tensor):
    """int8 values with one scale per row that acts as a floating-point matrix in `F.linear`."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Int8Weight:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def dequantize(self) -> Tensor:
        return self.values.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        if func not in (torch.ops.aten.t.default, torch.ops.aten.mm.default):
            raise NotImplementedError(f"{func} of an int8 weight")
        dense = tree_map(lambda x: x.dequantize() if isinstance(x, cls) else x, args)
        return func(*dense, **(kwargs or {}))


@pytest.fixture
def lora() -> type[Lora]:
    """The wrapper: `lora(layer)` adds an adapter; `.merged()` computes the same with one layer."""
    return Lora


@pytest.fixture
def quantise() -> Callable[[nn.Module], Tensor]:
    """Replaces a layer's weight by an int8 one, and returns the values that it represents."""

    def replace(layer: nn.Module) -> Tensor:
        weight = Int8Weight.of(layer.weight)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return weight.dequantize()

    return replace
