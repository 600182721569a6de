"""A model with the parameters of Parakeet's attention, which needs no other library."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

D, H = 12, 3


class Attention(nn.Module):
    """The convention of Parakeet's attention, written out."""

    is_shifted = True

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation="eager")
        self.head_dim, self.scaling, self.attention_dropout = D // H, (D // H) ** -0.5, 0.0
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(D, D))
        self.relative_k_proj = nn.Linear(D, D, bias=False)
        self.bias_u, self.bias_v = (nn.Parameter(torch.randn(H, D // H)) for _ in range(2))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        **options: object,
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (H, -1)).transpose(1, 2)

        T = hidden_states.shape[1]
        q, k, v = (heads(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
        r = heads(self.relative_k_proj(position_embeddings))
        positions = (q + self.bias_v[:, None]) @ r.mT  # [B, H, T, 2T - 1]
        if self.is_shifted:
            row = torch.arange(T) - torch.arange(T)[:, None] + T - 1
            positions = positions.gather(3, row.expand(*positions.shape[:2], T, T))
        scores = ((q + self.bias_u[:, None]) @ k.mT + positions[..., :T]) * self.scaling
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        probs = scores.softmax(-1)
        return self.o_proj((probs @ v).transpose(1, 2).flatten(2)), probs


class Unshifted(Attention):
    """The same parameters and another formula, as WeNet's classes have."""

    is_shifted = False


class Model(nn.Module):
    def __init__(self, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(attention() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
        T = x.shape[1]
        table = torch.sin(torch.arange(T - 1, -T, -1)[:, None] / 1.7 ** torch.arange(D)).to(x)
        for layer in self.layers:
            x = x + layer(x, table.expand(len(x), -1, -1), mask, **options)[0]
        return x


def outcome(model: nn.Module, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(x, mask)
    out.square().mean().backward()
    return {"out": out.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)


def sharded(model: nn.Module) -> nn.Module:
    layer = model.layers[0]
    layer.__class__ = type("FSDPAttention", (FSDPModule, type(layer)), {})  # as fully_shard does
    return model
