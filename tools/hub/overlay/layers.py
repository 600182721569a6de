"""Layers without state: `kernels.kernelize` replaces the `forward` of a model's layer by theirs.

The attention has no layer here: every family of models has its own `forward`, with other arguments.
"""

from __future__ import annotations

from torch import Tensor, nn

from txl_kernels.ops.adaptive_softmax import adaptive_nll
from txl_kernels.torch_private import ASMoutput


class AdaptiveLogSoftmaxWithLoss(nn.Module):
    """`forward` of `torch.nn.AdaptiveLogSoftmaxWithLoss`, without N × V logits and `nonzero`.

    Outputs of 16-bit inputs are float32. A target of -100 has the output 0 and counts in the mean;
    torch refuses it.
    """

    has_backward = True
    can_torch_compile = True

    # Of the layer whose `forward` is replaced.
    head: nn.Linear
    tail: nn.ModuleList
    cutoffs: list[int]

    def forward(self, input_: Tensor, target_: Tensor) -> ASMoutput:
        """log p of each target, and the mean of their losses.

        Args:
            input_: [N, in_features], or [in_features] of one token.
            target_: int64 [N], or [] of one token.

        Returns:
            `output`: log p [N] or []; `loss`: in nats.

        Raises:
            ValueError, TypeError: wrong shapes or dtypes.
            IndexError: a target out of range (on the CPU; a device assert on CUDA).
        """
        is_one = target_.dim() == 0
        nll = adaptive_nll(
            input_[None] if is_one else input_,
            target_[None] if is_one else target_,
            self.head.weight,
            [(layers[0].weight, layers[1].weight, None) for layers in self.tail],
            cutoffs=tuple(self.cutoffs[:-1]),
            head_bias=self.head.bias,
        )
        return ASMoutput(-nll[0] if is_one else -nll, nll.mean())
