"""Attention of the Inkling models: `rel_attention` computes what their materialised bias gives,
forward and gradients. Hugging Face's own models are in test_inkling_models.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks.peers import inkling
from txl_kernels import rel_attention_with_lse, with_sink

B, H, HK, D, D_REL, R = 2, 6, 2, 8, 5, 9


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call of an attention layer.

    Attributes:
        n_before: tokens before the first query.
        n_keys: keys of the call; all tokens up to the last query if None.
        first_key: token of key 0.
        window: tokens that a query attends to, itself included; None: all before it.
        padding: tokens of padding at the left of each row.
        floor: from this position on, queries grow with the logarithm of their position.
        has_sink: Inkling 2's sink.
    """

    n_queries: int = 13
    n_before: int = 0
    n_keys: int | None = None
    first_key: int = 0
    window: int | None = None
    padding: tuple[int, ...] = (0,) * B
    floor: int | None = None
    has_sink: bool = False

    @property
    def is_static(self) -> bool:
        """Whether the keys are a whole cache of fixed capacity."""
        return self.n_keys is not None

    @property
    def n_all_keys(self) -> int:
        return self.n_keys or self.n_before + self.n_queries - self.first_key


LAYERS = {
    "sliding": Layer(window=R),
    "global_tau": Layer(n_queries=19, floor=4),
    "left_padding": Layer(padding=(4, 0), floor=4),
    "sliding_left_padding": Layer(window=R, padding=(11, 2)),
    "dynamic_cache": Layer(n_queries=3, n_before=20, floor=4),
    "dynamic_cache_sliding": Layer(n_queries=3, n_before=20, first_key=12, window=R),
    "dynamic_cache_padding": Layer(n_queries=1, n_before=11, padding=(5, 0)),
    "static_cache": Layer(n_queries=3, n_before=7, n_keys=40, floor=4),
    "static_cache_sliding": Layer(n_queries=2, n_before=14, n_keys=30, first_key=6, window=R),
    "static_cache_padding": Layer(n_queries=1, n_before=5, n_keys=16, padding=(3, 0)),
    "sinks": Layer(n_queries=19, floor=4, has_sink=True),
    "sinks_sliding_cache": Layer(
        n_queries=3, n_before=20, first_key=12, window=R, padding=(13, 0), has_sink=True
    ),
}


def tensors(layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves: queries, keys, values, relative states, the table of profiles and the sinks."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    shapes = {
        "q": (B, H, layer.n_queries, D),
        "k": (B, HK, layer.n_all_keys, D),
        "v": (B, HK, layer.n_all_keys, D),
    }
    found = {name: normal(*shape) for name, shape in shapes.items()}
    found |= {"rel": normal(B, H, layer.n_queries, D_REL), "proj": normal(D_REL, R)}
    return found | ({"sink": normal(B, H, layer.n_queries)} if layer.has_sink else {})


def tau(layer: Layer, dtype: torch.dtype) -> Tensor | None:
    if layer.floor is None:
        return None
    position = torch.arange(layer.n_queries) + layer.n_before
    return (1 + 0.1 * ((position + 1).to(dtype) / layer.floor).clamp(min=1).log())[:, None]


def materialised(layer: Layer, x: dict[str, Tensor]) -> Tensor:
    """The peer's output."""
    query = torch.arange(layer.n_queries) + layer.n_before
    key = torch.arange(layer.n_all_keys) + layer.first_key
    distance = query[:, None] - key
    attends = distance >= 0
    if layer.window is not None:
        attends &= distance < layer.window
    attends = attends & (key >= torch.tensor(layer.padding)[:, None, None, None])
    peer = inkling.with_sink if layer.has_sink else inkling.materialised
    options = {"distance": distance, "attends": attends, "tau": tau(layer, x["q"].dtype)}
    return peer(**x, **options, scale=1 / D)


def fused(layer: Layer, x: dict[str, Tensor], backend: str) -> Tensor:
    """The same by `rel_attention`."""
    q, rel, factor = x["q"], x["rel"], tau(layer, x["q"].dtype)
    if factor is not None:
        q, rel = q * factor, rel * factor
    q_start = torch.full((B,), layer.n_before - layer.first_key)
    out, lse = rel_attention_with_lse(
        q,
        x["k"],
        x["v"],
        x["proj"].T.flip(0)[None, None],
        q_pos=rel,
        scale=1 / D,
        pos_scale=1.0,
        offset=R - 1 - (layer.n_all_keys - layer.n_queries),
        causal=True,
        window=None if layer.window is None else (layer.window - 1, None),
        key_start=torch.tensor(layer.padding) - layer.first_key,
        q_start=q_start if layer.is_static else None,
        backend=backend,
    )
    return with_sink(out, lse, x["sink"])[0] if layer.has_sink else out


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_attention_of_inkling(name, backend):
    layer = LAYERS[name]
    # Queries that are padding themselves are not compared.
    query = torch.arange(layer.n_queries) + layer.n_before
    is_real = (query >= torch.tensor(layer.padding)[:, None])[:, None, :, None]

    def results(dtype: torch.dtype, attend) -> dict[str, Tensor]:
        x = tensors(layer, dtype)
        out = attend(layer, x).masked_fill(~is_real, 0)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        grads = torch.autograd.grad(out, list(x.values()), weights)
        named = zip(x, grads, strict=True)
        return {"out": out.detach(), **{f"d{key}": grad for key, grad in named}}

    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        actual = results(dtype, lambda layer, x: fused(layer, x, backend))
        expected = results(torch.float64, materialised)
        for key, x in expected.items():
            assert float(x.norm()) > 0
            error = float((actual[key] - x).norm() / x.norm())
            assert error <= limit, f"{dtype} {key}: {error}"
