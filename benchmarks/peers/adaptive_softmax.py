"""PyTorch's own adaptive softmax, and the whole softmax that it approximates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import PeerUnavailableError
from benchmarks.softmax_inputs import SoftmaxInputs


def torch_module(inputs: SoftmaxInputs) -> nn.AdaptiveLogSoftmaxWithLoss:
    """torch's module on these very tensors; without its projections where there are none."""
    head = inputs.head_weight
    ends = [head.shape[0] - len(inputs.tail_weights)]
    for weight in inputs.tail_weights:
        ends.append(ends[-1] + weight.shape[0])
    module = nn.AdaptiveLogSoftmaxWithLoss(
        head.shape[1], ends[-1], ends[:-1], div_value=1.0, head_bias=True, device="meta"
    )
    _give(module.head, head, inputs.head_bias)
    for k, weight in enumerate(inputs.tail_weights):
        tail = module.tail[k]
        assert isinstance(tail, nn.Sequential)
        _give(tail[1], weight)
        if inputs.projections:
            _give(tail[0], inputs.projections[k])
        else:
            tail[0] = nn.Identity()
    return module


def full_loss(hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
    """Mean loss of the softmax over all V, whose logits [N, V] are made."""
    return F.cross_entropy(F.linear(hidden, table), target)


def chunked_full_loss(hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
    """The same from torch's fused function, its chunks chosen by torch."""
    if not hasattr(F, "linear_cross_entropy"):
        raise PeerUnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = nn.LinearCrossEntropyOptions()
    loss: Tensor = F.linear_cross_entropy(hidden, table, target, options=options)
    return loss


def _give(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Let a layer compute with tensors that are leaves elsewhere."""
    for name, tensor in {"weight": weight, "bias": bias}.items():
        delattr(layer, name)
        setattr(layer, name, tensor)
