"""GroupedQueryAttention with its RelativeBias: the dense formula, streams, documents, bad sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_xl.nn import GroupedQueryAttention, RelativeBias, grouped_query_attention
from txl_kernels import banded_attention

B, D_MODEL, H, D, D_REL = 2, 12, 4, 5, 3


def attention(n_kv_head: int = 2, extent: int = 4, **options: Any) -> GroupedQueryAttention:
    torch.manual_seed(0)
    rel = RelativeBias(D_MODEL, H, D_REL, extent)
    module = GroupedQueryAttention(D_MODEL, H, n_kv_head, D, rel=rel, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, length, D_MODEL, dtype=torch.float64, generator=generator)


def heads(projected: Tensor, n: int) -> Tensor:
    return projected.unflatten(-1, (n, -1)).transpose(1, 2)


def dense(module: GroupedQueryAttention, x: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The same with all scores in memory; the bias as Hugging Face's Inkling computes it."""
    T, group = x.shape[1], module.n_head // module.n_kv_head
    q = heads(module.q_proj(x), module.n_head)
    k, v = (
        heads(net(x), module.n_kv_head).repeat_interleave(group, dim=1)
        for net in (module.k_proj, module.v_proj)
    )
    profiles = heads(module.rel.r_proj(x), module.n_head) @ module.rel.proj  # [B, H, T, extent]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    index = distance.clamp(0, module.rel.extent - 1).expand(len(x), module.n_head, T, T)
    has_bias = (distance >= 0) & (distance < module.rel.extent)
    bias = profiles.gather(-1, index).masked_fill(~has_bias, 0)
    scores = module.scale * q @ k.mT + module.pos_scale * bias
    visible = distance >= 0
    if module.window is not None and module.window[0] is not None:
        visible = visible & (distance <= module.window[0])
    if allowed is not None:
        visible = visible & allowed
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return module.o_proj((probs @ v).transpose(1, 2).flatten(2))


@settings(max_examples=6)
@given(
    length=st.integers(1, 9),
    n_kv_head=st.sampled_from([1, 2, 4]),
    extent=st.integers(1, 10),
    window=st.none() | st.tuples(st.integers(0, 8), st.none() | st.integers(0, 3)),
    scale=st.none() | st.just(0.2),
    pos_scale=st.sampled_from([1.0, 0.7]),
)
def test_it_is_the_dense_formula(length: int, **options: Any) -> None:
    module, x = attention(**options), tokens(length).requires_grad_()
    out, expected = module(x), dense(module, x)
    torch.testing.assert_close(out, expected)
    weight = torch.rand_like(out)
    inputs = [x, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
    )


def test_banded_attention_serves_calls_without_further_rules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x = attention(), tokens(9).requires_grad_()
    inputs = [x, *module.parameters()]
    expected = module(x)
    gradients = torch.autograd.grad(expected.sum(), inputs)
    called = []

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        called.append(kwargs)
        return banded_attention(*args, **kwargs)

    monkeypatch.setattr(grouped_query_attention, "banded_is_faster", lambda *_: True)
    monkeypatch.setattr(grouped_query_attention, "banded_attention", recorded)
    out = module(x)
    assert len(called) == 1
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs), gradients)
    module(x, key_start=torch.zeros(B, dtype=torch.int64))
    module.stream(x, cache_len=3)
    attention(window=(2, 0))(x)
    assert len(called) == 1


@pytest.mark.parametrize("window", [None, (3, 0)])
def test_streaming_equals_one_block(window: tuple[int, int] | None) -> None:
    module, x = attention(window=window), tokens(9)
    cache, outputs = None, []
    for block in x.split([3, 1, 5], dim=1):
        out, cache = module.stream(block, cache, cache_len=9 if window is None else 3)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), module(x))
    assert cache.k.shape == (B, 2, 9 if window is None else 3, D)


def test_a_preallocated_cache_is_read_up_to_the_queries() -> None:
    """Rows of different length in one cache; positions that are not filled hold NaN."""
    module, x, capacity = attention(), tokens(6), 8
    q_start = torch.tensor([5, 3])
    mem_k, mem_v = (torch.full((B, 2, capacity - 1, D), torch.nan).double() for _ in range(2))
    block = torch.empty(B, 1, D_MODEL, dtype=x.dtype)
    for b, p in enumerate(q_start.tolist()):
        k, v = module.project_kv(x[b : b + 1, : p + 1])
        mem_k[b, :, : p + 1], mem_v[b, :, : p + 1] = k[0], v[0]
        block[b] = x[b, p]
    out = module(block, mem_k=mem_k, mem_v=mem_v, q_start=q_start, key_lens=q_start + 1)
    for b, p in enumerate(q_start.tolist()):
        torch.testing.assert_close(out[b, 0], module(x)[b, p])


def test_packed_documents_see_only_themselves() -> None:
    module, x = attention(), tokens(7)
    start = torch.tensor([[0, 0, 2, 2, 2, 5, 5], [0, 1, 1, 1, 1, 1, 1]])
    out = module(x, key_start=start)
    alone = [module(part) for part in x[:1].split([2, 3, 2], dim=1)]
    torch.testing.assert_close(out[:1], torch.cat(alone, dim=1))
    torch.testing.assert_close(out[1:, 1:], module(x[1:, 1:]))
    allowed = (torch.arange(7) >= start[..., None])[:, None]  # [B, 1, T, T]
    torch.testing.assert_close(out, module(x, mask=allowed))
    torch.testing.assert_close(out, dense(module, x, allowed))


def test_parameters_have_inklings_names_and_shapes() -> None:
    shapes = {
        name: tuple(p.shape) for name, p in attention(n_kv_head=1, extent=7).named_parameters()
    }
    assert shapes == {
        "q_proj.weight": (H * D, D_MODEL),
        "k_proj.weight": (D, D_MODEL),
        "v_proj.weight": (D, D_MODEL),
        "o_proj.weight": (D_MODEL, H * D),
        "rel.r_proj.weight": (H * D_REL, D_MODEL),
        "rel.proj": (D_REL, 7),
    }


def test_wrong_sizes_are_named() -> None:
    rel = RelativeBias(D_MODEL, H, D_REL, 4)
    with pytest.raises(ValueError, match="n_kv_head: expected a divisor of n_head 4, got 3"):
        GroupedQueryAttention(D_MODEL, H, 3, D, rel=rel)
    with pytest.raises(ValueError, match="rel: expected d_model 12, n_head 2, got 12, 4"):
        GroupedQueryAttention(D_MODEL, 2, 2, D, rel=rel)
    with pytest.raises(ValueError, match=r"x must have shape \[B, T, 12\], got \[2, 12\]"):
        rel(torch.zeros(2, 12))
    with pytest.raises(ValueError, match=r"x: expected \[B, T, 12\], got \[2, 3, 5\]"):
        GroupedQueryAttention(D_MODEL, H, 2, D, rel=rel)(torch.zeros(2, 3, 5))
