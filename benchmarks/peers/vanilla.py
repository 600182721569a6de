"""The Transformer of Al-Rfou et al. with absolute positions, as one layer of its evaluation.

A layer's learned positions are counted within the window. When the window moves by a token, all its
hidden states change, so that every token costs the window's computation in all layers. The last
layer computes its output at the last position only. Keys and values can be cached exactly while a
text fills its first window.

Source: Al-Rfou et al. 2019, Character-Level Language Modeling with Deeper Self-Attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q [B, H, Tq, D], k and v [B, H, Tk, D]


class VanillaLayer(nn.Module):
    """norm(h + attention(h)), then norm(… + feed-forward), of h = x + position; causal.

    Args:
        d_model, n_head, d_head, d_inner: sizes.
        n_positions: tokens of the window, T.
    """

    def __init__(
        self, d_model: int, n_head: int, d_head: int, d_inner: int, n_positions: int
    ) -> None:
        super().__init__()
        self.n_head, self.d_head = n_head, d_head
        self.width = n_head * d_head
        self.position = nn.Parameter(torch.randn(n_positions, d_model) * 0.02)
        self.qkv_net = nn.Linear(d_model, 3 * self.width, bias=False)
        self.o_net = nn.Linear(self.width, d_model, bias=False)
        self.attn_layer_norm = nn.LayerNorm(d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_inner), nn.ReLU(), nn.Linear(d_inner, d_model)
        )
        self.ff_layer_norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """[B, T, d_model] to the same, at all positions: an inner layer."""
        h = x + self.position
        q, k, v = (self._heads(y) for y in self.qkv_net(h).chunk(3, dim=-1))
        return self._after_attention(h, attend(q, k, v))

    def last(self, x: Tensor, attend: Attend) -> Tensor:
        """The output [B, 1, d_model] at the last position only: the last layer."""
        h = x + self.position
        w_q, w_kv = self.qkv_net.weight.split([self.width, 2 * self.width])
        newest = h[:, -1:]
        k, v = (self._heads(y) for y in nn.functional.linear(h, w_kv).chunk(2, dim=-1))
        q = self._heads(nn.functional.linear(newest, w_q))
        return self._after_attention(newest, attend(q, k, v))

    def step(self, x: Tensor, cache: Tensor, position: int) -> Tensor:
        """The output of the token `x` [B, 1, d_model] at `position`, 0 <= position < T.

        `cache` [2, B, H, T, D] has the keys and values of the tokens before it; those of this one
        are written into it.
        """
        h = x + self.position[position]
        q, k, v = (self._heads(y) for y in self.qkv_net(h).chunk(3, dim=-1))
        cache[0, :, :, position], cache[1, :, :, position] = k[:, :, 0], v[:, :, 0]
        return self._after_attention(h, sdpa(q, *cache[:, :, :, : position + 1]))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, H, T, D] of [B, T, H · D]."""
        return x.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)

    def _after_attention(self, h: Tensor, out: Tensor) -> Tensor:
        attended = self.attn_layer_norm(h + self.o_net(out.transpose(1, 2).flatten(2)))
        normed: Tensor = self.ff_layer_norm(attended + self.feed_forward(attended))
        return normed


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`scaled_dot_product_attention`: causal if there are as many queries as keys, else one
    query that attends to all keys."""
    return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2] > 1)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in eager PyTorch: scores [B, H, Tq, Tk], mask, softmax, product."""
    Tq, Tk = q.shape[2], k.shape[2]
    scores = q @ k.mT * q.shape[3] ** -0.5
    if Tq > 1:
        later = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(1 + Tk - Tq)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1) @ v


def empty_cache(layer: VanillaLayer, batch_size: int) -> Tensor:
    """Keys and values [2, B, H, T, D] of no token."""
    size = (2, batch_size, layer.n_head, len(layer.position), layer.d_head)
    return layer.position.new_zeros(size)


def formula(layer: VanillaLayer, x: Tensor) -> Tensor:
    """The layer in float64, each position and head by itself: [B, T, d_model] to the same."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    h = x + layer.position
    q, k, v = layer.qkv_net(h).chunk(3, dim=-1)
    out = torch.empty_like(q)
    D = layer.d_head
    for t in range(x.shape[1]):
        for head in range(layer.n_head):
            columns = slice(head * D, (head + 1) * D)
            scores = (k[:, : t + 1, columns] * q[:, t, None, columns]).sum(-1) / D**0.5
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)  # [B, t + 1]
            out[:, t, columns] = (weights[..., None] * v[:, : t + 1, columns]).sum(1)
    attended = layer.attn_layer_norm(h + layer.o_net(out))
    normed: Tensor = layer.ff_layer_norm(attended + layer.feed_forward(attended))
    return normed


def errors(layer: VanillaLayer, x: Tensor) -> dict[str, float]:
    """The relative error by Frobenius norm of each way of computing the layer on a full window
    `x` [B, T, d_model], with `formula` as the standard."""
    right = formula(layer, x)
    cache = empty_cache(layer, len(x))
    steps = [layer.step(x[:, t : t + 1], cache, t) for t in range(x.shape[1])]
    outs = {"cached": torch.cat(steps, dim=1)}
    for name, attend in (("sdpa", sdpa), ("eager", eager)):
        outs |= {f"inner-{name}": layer(x, attend), f"last-{name}": layer.last(x, attend)}
    expected = {name: right[:, -out.shape[1] :] for name, out in outs.items()}
    return {
        name: float((out.double() - expected[name]).norm() / expected[name].norm())
        for name, out in outs.items()
    }
