"""Hugging Face's InklingAttention with random weights, whole or without projections, and caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inputs import AttentionShape
from benchmarks.peers.given import Given, Unchanged
from benchmarks.peers.hugging_face import modeling

LOG_SCALING_FLOOR = 128_000  # of the published models: queries beyond it grow
# Normalised queries and keys of trained models have weights; with these the scores are about 1.
_SCALE_OF_Q_AND_K, _PROFILE_STD = 3.0, 0.25


@dataclasses.dataclass
class CoreInputs:
    """The tensors between the projections of an attention; [B, T, heads * width]."""

    q: Tensor
    k: Tensor
    v: Tensor
    rel: Tensor
    proj: nn.Parameter  # [d_rel, R]

    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.rel, self.proj]

    def convert(self, dtype: torch.dtype) -> CoreInputs:
        """Copies in another dtype, as leaves that require gradients where these do."""
        tensors = (x.detach().to(dtype).requires_grad_(x.requires_grad) for x in self.leaves())
        *sequences, proj = tensors
        return CoreInputs(*sequences, nn.Parameter(proj.detach(), proj.requires_grad))


class FixedCache:
    """A cache whose keys and values are given: each call adds its token at their end anew."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:  # [B, Hk, Tk, D]
        self.states = keys, values

    def get_mask_sizes(self, n_query: int, layer_idx: int) -> tuple[int, int]:
        return self.states[0].shape[2], 0

    def get_query_offset(self, layer_idx: int) -> int:
        return self.states[0].shape[2] - 1

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.states


def attention(shape: AttentionShape) -> Any:
    """A float32 attention with its projections; sliding if the shape has a window."""
    torch.manual_seed(0)
    module = modeling("inkling").InklingAttention(_config(shape), 0)
    nn.init.normal_(module.rel_logits_proj.proj, std=_PROFILE_STD)
    for norm in (module.q_norm, module.k_norm):
        nn.init.constant_(norm.weight, _SCALE_OF_Q_AND_K)
    return module.eval().requires_grad_(False)


def core(shape: AttentionShape, inputs: CoreInputs) -> Any:
    """The attention without projections, norms and short convolutions.

    Its forward needs any tensor [B, Tq, …] and returns ([B, Tq, H * D], …).
    """
    with torch.device("meta"):
        module = modeling("inkling").InklingAttention(_config(shape), 0)
    for name, tensor in zip("qkvr", inputs.leaves(), strict=False):
        setattr(module, f"{name}_proj", Given(tensor))
    for name in ("q_norm", "k_norm", "k_sconv", "v_sconv"):
        setattr(module, name, Unchanged())
    module.o_proj = nn.Identity()
    module.rel_logits_proj.proj = inputs.proj
    return module.eval()


def core_inputs(shape: AttentionShape, *, requires_grad: bool = False, seed: int = 0) -> CoreInputs:
    """Normal random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    assert shape.d_rel
    assert shape.rel_extent
    heads = {"q": shape.H * shape.D, "k": shape.n_key_heads * shape.D}
    q, k = (_SCALE_OF_Q_AND_K * normal(shape.B, shape.Tq, width) for width in heads.values())
    v = normal(shape.B, shape.Tq, heads["k"])
    rel = normal(shape.B, shape.Tq, shape.H * shape.d_rel)
    proj = nn.Parameter(_PROFILE_STD * normal(shape.d_rel, shape.rel_extent), requires_grad)
    return CoreInputs(*(x.requires_grad_(requires_grad) for x in (q, k, v, rel)), proj)


def window_mask(shape: AttentionShape) -> Tensor | None:
    """The mask of a sliding layer, bool [1, 1, Tq, Tk], that the model makes; else None."""
    if shape.window is None or shape.Tq == 1:
        return None
    i, j = torch.arange(shape.Tq)[:, None], torch.arange(shape.n_keys)
    return ((j <= i) & (j >= i - shape.window))[None, None]


def core_rows(
    shape: AttentionShape,
    inputs: CoreInputs,
    rows: Tensor,
    states: tuple[Tensor, Tensor] | None = None,  # keys and values [1, Hk, Tk, D]
) -> Tensor:
    """[len(rows), H * D]: the output of row 0 for some queries, by its formula in float64.

    Args:
        rows: positions of the queries; the queries of `inputs` are the last ones.
        states: the keys and values of a cache; by default those of `inputs`.
    """
    heads = (shape.B, -1, shape.n_key_heads, shape.D)
    if states is None:
        states = inputs.k.view(heads).transpose(1, 2), inputs.v.view(heads).transpose(1, 2)
    k, v = (x[0].double() for x in states)  # [Hk, Tk, D]
    n_group, first = shape.H // shape.n_key_heads, k.shape[1] - inputs.q.shape[1]
    proj, outputs = inputs.proj.detach().double(), []
    for i in rows.tolist():
        begin = 0 if shape.window is None else max(0, i - shape.window)
        q = inputs.q[0, i - first].detach().double().view(-1, n_group, shape.D)
        rel = inputs.rel[0, i - first].detach().double().view(-1, n_group, proj.shape[0])
        distance = i - torch.arange(begin, i + 1)
        columns = proj[:, distance.clamp(max=proj.shape[1] - 1)]
        bias = (rel @ columns) * (distance < proj.shape[1])
        scores = q @ k[:, begin : i + 1].mT / shape.D + bias  # [Hk, n_group, keys]
        outputs.append((scores.softmax(-1) @ v[:, begin : i + 1]).flatten())
    return torch.stack(outputs)


def _config(shape: AttentionShape) -> Any:
    from transformers.models.inkling.configuration_inkling import InklingTextConfig

    config = InklingTextConfig(
        hidden_size=shape.H * shape.D,
        num_hidden_layers=1,
        layer_types=["hybrid" if shape.window is None else "hybrid_sliding"],
        num_attention_heads=shape.H,
        num_key_value_heads=shape.n_key_heads,
        head_dim=shape.D,
        swa_num_attention_heads=shape.H,
        swa_num_key_value_heads=shape.n_key_heads,
        swa_head_dim=shape.D,
        sliding_window_size=512 if shape.window is None else shape.window + 1,
        d_rel=shape.d_rel,
        rel_extent=shape.rel_extent,
        log_scaling_n_floor=LOG_SCALING_FLOOR,
    )
    config._attn_implementation = "sdpa"
    return config


def dynamic_cache(shape: AttentionShape) -> Any:
    """transformers' DynamicCache for one such layer, empty."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=_config(shape))
