"""Hugging Face's Inkling and Inkling 2 with their attention computed by `rel_attention`: the same
outputs and the same gradients of all parameters. Runs where transformers with these models is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.peers.hugging_face import TINY_INKLING, VERSION
from txl_kernels import rel_attention_with_lse, with_sink

pytest.importorskip("transformers", minversion=VERSION)
inkling = pytest.importorskip("transformers.models.inkling.modeling_inkling")
inkling2 = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
cache_utils = pytest.importorskip("transformers.cache_utils")

T = 21


class StaticCache(cache_utils.StaticCache):
    """transformers 5.24.0 returns the counter of a layer itself as the offset of the queries, and
    `update` adds to it before Inkling's attention reads it."""

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:
        return torch.as_tensor(super().get_query_offset(layer_idx)).clone()


def attend(
    module: torch.nn.Module,
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, Hk, Tk, D]
    v: Tensor,  # [B, Hk, Tk, D]
    rel: Tensor,  # [B, H, Tq, d_rel]
    proj: Tensor,  # [d_rel, R]
    first_key: int,
    first_query: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rel_attention` for one layer; positions are counted over all tokens of the text.

    Args:
        first_key: position of key 0.
        first_query: position of query 0; None if the last query is at the last key.
    """
    R, n_padded = proj.shape[1], module.n_padded  # [B]
    q_start = None if first_query is None else (first_query - first_key).expand(len(q))
    return rel_attention_with_lse(
        q,
        k,
        v,
        proj.T.flip(0)[None, None],
        q_pos=rel,
        scale=module.scaling,
        pos_scale=1.0,
        offset=R - 1 - (k.shape[2] - q.shape[2]),
        causal=True,
        window=(TINY_INKLING["sliding_window_size"] - 1, None) if module.is_sliding else None,
        key_start=n_padded - first_key,
        q_start=q_start,
        backend=module.backend,
    )


def positions(module, cache, n: int) -> tuple[int, Tensor | None]:
    """`first_key` and `first_query` of `attend`, for the next n tokens."""
    if cache is None:
        return 0, None
    _, first_key = cache.get_mask_sizes(n, module.layer_idx)
    if not isinstance(cache, StaticCache):
        return first_key, None
    return first_key, cache.get_query_offset(module.layer_idx)


def inkling_forward(self, hidden_states, attention_mask, conv_mask=None, cache=None, **_):
    """`InklingAttention.forward`."""
    B, n, _ = hidden_states.shape
    shape = (B, n, -1, self.head_dim)
    options = {"cache": cache, "conv_mask": conv_mask}
    k = self.k_norm(self.k_sconv(self.k_proj(hidden_states), **options).view(shape))
    v = self.v_sconv(self.v_proj(hidden_states), **options).view(shape)
    q = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    rel = self.r_proj(hidden_states).view(B, n, self.num_heads, -1).transpose(1, 2)
    first_key, first_query = positions(self, cache, n)
    at = torch.arange(n) + (0 if cache is None else cache.get_query_offset(self.layer_idx))
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    if not self.is_sliding:
        tau = ((at + 1) / self.config.log_scaling_n_floor).clamp(min=1).log()
        tau = (1 + self.config.log_scaling_alpha * tau)[:, None]
        q, rel = q * tau, rel * tau
    out, _ = attend(self, q, k, v, rel, self.rel_logits_proj.proj, first_key, first_query)
    return self.o_proj(out.transpose(1, 2).reshape(B, n, -1)), None


def inkling2_forward(
    self,
    hidden_states,
    attention_mask,
    relative_distance,
    position_ids,
    conv_mask=None,
    cache=None,
    key_hidden_states=None,
    value_hidden_states=None,
    **_,
):
    """`forward` of Inkling 2's two attention classes."""
    B, n, _ = hidden_states.shape
    for_keys = hidden_states if key_hidden_states is None else key_hidden_states
    for_values = hidden_states if value_hidden_states is None else value_hidden_states
    q = self.q_proj(hidden_states, position_ids)
    k = self.k_proj(for_keys, cache=cache, conv_mask=conv_mask)
    v = self.v_proj(for_values, cache=cache, conv_mask=conv_mask)
    bias = self.relative_position_bias
    rel = bias.norm(bias.linear(hidden_states).view(B, n, self.num_heads, -1), position_ids)
    first_key, first_query = positions(self, cache, n)
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    out, lse = attend(self, q, k, v, rel.transpose(1, 2), bias.proj, first_key, first_query)
    out, _ = with_sink(out, lse, self.sink_proj(hidden_states).transpose(1, 2))
    return self.o_proj(out.transpose(1, 2).reshape(B, n, -1), hidden_states), None


MODELS = {
    "inkling-sdpa": (inkling, "sdpa"),
    "inkling-eager": (inkling, "eager"),
    "inkling2-eager": (inkling2, "eager"),
}


def build(name: str):
    """A random model, and its attention classes with what replaces their `forward`."""
    module, implementation = MODELS[name]
    torch.manual_seed(0)
    if module is inkling:
        options = {"mlp_layer_types": ["dense", "sparse"], "intermediate_size": 16}
        model = inkling.InklingTextModel(inkling.InklingTextConfig(**TINY_INKLING, **options))
        replaced = {inkling.InklingAttention: inkling_forward}
    else:
        clips = {"qk_l2_clip_threshold": 3.0, "rel_l2_clip_threshold": 1.0}
        model = inkling2.Inkling2TextModel(inkling2.Inkling2TextConfig(**TINY_INKLING, **clips))
        classes = (inkling2.Inkling2SlidingAttention, inkling2.Inkling2FullAttention)
        replaced = dict.fromkeys(classes, inkling2_forward)
    model.config._attn_implementation = implementation
    for parameter in model.parameters():
        if parameter.dim() > 1:  # also those whose initial values are all 0 or 1
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), replaced


def results(model, tokens: Tensor, padding: Tensor, blocks: list[int], cache) -> dict[str, Tensor]:
    """Hidden states of the last block and the gradients of all parameters from it.

    Args:
        padding: [B], tokens of padding at the left.
        blocks: the lengths of the blocks; all but the last fill the cache.
    """
    real = torch.arange(tokens.shape[1]) >= padding[:, None]
    mask = None if not padding.any() else real.long()
    ids = (real.cumsum(1) - 1).clamp(min=0)
    end = 0
    for block in blocks:
        begin, end = end, end + block
        with torch.set_grad_enabled(end == tokens.shape[1]):
            options = {} if cache is None else {"cache": cache}
            out = model(
                tokens[:, begin:end],
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=ids[:, begin:end],
                use_cache=cache is not None,
                **options,
            ).last_hidden_state
    out = out[real[:, begin:end]]  # padding may have any result
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    model.zero_grad()
    (out * weights).sum().backward()
    grads = {f"d{name}": x.grad.clone() for name, x in model.named_parameters()}
    return {"out": out.detach(), **grads}


CASES = {
    "one_pass": ([T], None, False),
    "left_padding": ([T], None, True),
    "dynamic_cache": ([9, 4, 8], "dynamic", False),
    "dynamic_cache_padding": ([9, 12], "dynamic", True),
    "dynamic_cache_token": ([T - 1, 1], "dynamic", False),
    "static_cache": ([9, 4, 8], "static", False),
    "static_cache_padding": ([4, 17], "static", True),
    "static_cache_token": ([4, T - 5, 1], "static", False),
}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_same_with_rel_attention(name, case, backend, monkeypatch):
    model, replaced = build(name)
    blocks, kind, is_padded = CASES[case]
    tokens = torch.randint(
        0, TINY_INKLING["vocab_size"], (3, T), generator=torch.Generator().manual_seed(1)
    )
    padding = torch.tensor([3, 0, 7] if is_padded else [0, 0, 0])

    def cache():
        if kind == "dynamic":
            return cache_utils.DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=T + 6) if kind == "static" else None

    expected = results(model, tokens, padding, blocks, cache())
    for attention_class, forward in replaced.items():
        monkeypatch.setattr(attention_class, "forward", forward)
    for layer in model.layers:
        layer.self_attn.n_padded, layer.self_attn.backend = padding, backend
    actual = results(model, tokens, padding, blocks, cache())
    largest = max(float(x.norm()) for x in expected.values())
    assert all(float(x.norm()) > 0 for key, x in expected.items() if "proj" in key)
    for key, x in expected.items():
        error = float((actual[key] - x).norm())
        assert error <= 1e-5 * float(x.norm()) + 1e-7 * largest, f"{key}: {error}"
