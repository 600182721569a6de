"""The position-wise feed-forward network of a layer: Linear, ReLU, Linear."""

from __future__ import annotations

from torch import Tensor, nn

from transformer_xl.nn.dropout import Dropout
from transformer_xl.nn.linear import Sequential
from txl_kernels.ops.checks import check_int


class PositionwiseFeedForward(nn.Module):
    """max(0, x W₁ᵀ + b₁) W₂ᵀ + b₂ with dropout after each product; no residual, no norm.

    Args:
        d_model, d_inner: width of `x` and of the hidden layer.
        dropout: probability, after each of the two products.

    Source: Vaswani et al. 2017, section 3.3.
    """

    def __init__(self, d_model: int, d_inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        op = type(self).__name__
        d_model = check_int(op, "d_model", d_model, at_least=1)
        d_inner = check_int(op, "d_inner", d_inner, at_least=1)
        self.CoreNet = Sequential(
            nn.Linear(d_model, d_inner),
            nn.ReLU(),  # in place it would change the output that hooks of the first layer receive
            Dropout(dropout),
            nn.Linear(d_inner, d_model),
            Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[…, d_model] to […, d_model]."""
        out: Tensor = self.CoreNet(x)
        return out
