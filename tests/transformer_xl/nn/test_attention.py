"""RelativeMultiHeadAttention: causal, bidirectional, windowed, streaming; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_xl.nn import RelativeMultiHeadAttention

B, D_MODEL, H, D = 2, 12, 3, 5


def attention(**options: Any) -> RelativeMultiHeadAttention:
    torch.manual_seed(0)
    module = RelativeMultiHeadAttention(D_MODEL, H, D, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def tokens(length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, length, D_MODEL, dtype=torch.float64, generator=generator)


def by_pairs(
    module: RelativeMultiHeadAttention,
    x: Tensor,
    layer_memory: Tensor,
    q_start: Tensor,
    ranges: Tensor,
) -> Tensor:
    """The same from the definition: one score per pair of tokens, no table.

    q_start [B]: the position of each row's first query; ranges [B, T, 2]: its first key, and the
    first key after its last one.
    """
    causal, window = module.pos_emb.causal, module.pos_emb.window or (None, None)
    left, right = (float("inf") if side is None else side for side in window)
    clamp_len = module.pos_emb.clamp_len if module.pos_emb.clamp_len > 0 else float("inf")
    both = torch.cat([layer_memory, x], dim=1)
    T, Tk = x.shape[1], both.shape[1]
    group = H // module.n_kv_head
    widths = [n * D for n in (H, module.n_kv_head, module.n_kv_head)]
    q, k, v = (
        part.unflatten(-1, (-1, D)) for part in (both @ module.qkv_net.weight.t()).split(widths, -1)
    )
    k, v = (part.repeat_interleave(group, dim=2) for part in (k, v))
    out = torch.zeros(B, T, H, D, dtype=x.dtype)
    assert module.r_w_bias is not None
    assert module.r_r_bias is not None
    for b in range(B):
        for i in range(T):
            query, p = q[b, Tk - T + i], int(q_start[b]) + i
            keys = range(*ranges[b, i].tolist())
            keys = [j for j in keys if -right <= p - j <= left and (j <= p or not causal)]
            if not keys:
                continue
            distance = torch.tensor([max(min(p - j, clamp_len), -clamp_len) for j in keys]).double()
            angle = distance[:, None] / 10000 ** (torch.arange(0, D_MODEL, 2).double() / D_MODEL)
            r = torch.cat([angle.sin(), angle.cos()], dim=-1) @ module.r_net.weight.t()
            content = (query + module.r_w_bias) * k[b, keys]  # [keys, H, D]
            position = (query + module.r_r_bias) * r.view(-1, H, D)
            probs = ((content + position).sum(-1) / D**0.5).softmax(0)  # [keys, H]
            out[b, i] = (probs[..., None] * v[b, keys]).sum(0)
    return out.flatten(2) @ module.o_net.weight.t()


@settings(max_examples=40)
@given(
    length=st.integers(1, 6),
    memory_length=st.integers(0, 9),
    n_kv_head=st.sampled_from([1, 3]),
    causal=st.booleans(),
    clamp_len=st.integers(-1, 8),
    left=st.none() | st.integers(0, 8),
    right=st.none() | st.integers(0, 4),
    moved=st.booleans(),
    ranged=st.booleans(),
)
def test_it_is_attention_by_pairs(
    length: int,
    memory_length: int,
    left: int | None,
    right: int | None,
    moved: bool,
    ranged: bool,
    **options: Any,
) -> None:
    module = attention(window=(left, right), **options)
    x, layer_memory = tokens(length), tokens(memory_length, seed=2)
    n_keys = memory_length + length
    q_start = torch.randint(memory_length + 1, (B,)) if moved else torch.full((B,), memory_length)
    ranges = torch.tensor([0, n_keys]).expand(B, length, 2)
    keys: dict[str, Tensor] = {"q_start": q_start} if moved else {}
    if ranged:
        ranges = torch.randint(n_keys + 1, (B, length, 2))
        keys |= {"key_start": ranges[..., 0], "key_lens": ranges[..., 1].int()}
    out = module(x, layer_memory, **keys)
    torch.testing.assert_close(out, by_pairs(module, x, layer_memory, q_start, ranges))


def test_no_memory_is_a_memory_of_length_0() -> None:
    module = attention()
    torch.testing.assert_close(module(tokens(4)), module(tokens(4), tokens(0)))


@pytest.mark.parametrize("causal", [True, False])
def test_a_memory_before_a_block_equals_the_longer_block(causal: bool) -> None:
    module, x = attention(causal=causal), tokens(9)
    expected = module(x)[:, 5:]
    torch.testing.assert_close(module(x[:, 5:], x[:, :5]), expected)


def test_causal_attention_ignores_later_tokens() -> None:
    module, x = attention(), tokens(6)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(module(changed)[:, :4], module(x)[:, :4], rtol=0, atol=0)


@pytest.mark.parametrize("blocks", [[1] * 9, [4, 5], [3, 1, 5], [9]])
@pytest.mark.parametrize("window", [None, (3, 0)])
def test_streaming_equals_one_block(blocks: list[int], window: tuple[int, int] | None) -> None:
    module, x = attention(window=window), tokens(9)
    cache_len = 9 if window is None else window[0]
    cache, outputs = None, []
    for block in x.split(blocks, dim=1):
        out, cache = module.stream(block, cache, cache_len=cache_len)
        outputs.append(out)
        assert cache.k.shape[2] <= cache_len
        assert not cache.k.requires_grad
    torch.testing.assert_close(torch.cat(outputs, dim=1), module(x))


def test_padding_on_either_side_changes_nothing() -> None:
    module, x = attention(causal=False), tokens(5)
    lens = torch.tensor([5, 3])
    out = module(x, key_lens=lens)
    torch.testing.assert_close(out[1, :3], module(x[1:, :3])[0])
    padded = torch.cat([torch.randn(B, 2, D_MODEL, dtype=x.dtype), x], dim=1)
    start = torch.tensor([2, 2])
    torch.testing.assert_close(module(padded, key_start=start)[:, 2:], module(x))


def test_a_dense_mask_hides_keys() -> None:
    module, x = attention(causal=False), tokens(5)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(module(x, mask=mask), attention()(x))


def test_memory_projections_carry_gradients_to_weights_and_memory_rows() -> None:
    module, x = attention(), tokens(3)
    layer_memory = tokens(4, seed=2).requires_grad_()
    module(x[:, :1], layer_memory).sum().backward()
    with_memory = module.qkv_net.weight.grad
    assert layer_memory.grad is not None
    assert layer_memory.grad.abs().sum(-1).gt(0).all()
    module.zero_grad()
    module(x[:, :1], layer_memory.detach()).sum().backward()
    torch.testing.assert_close(module.qkv_net.weight.grad, with_memory)


def test_biases_of_the_caller_replace_missing_ones() -> None:
    own, shared = attention(), attention(untie_r=False)
    state = own.state_dict()
    biases = {name: state.pop(name) for name in ("r_w_bias", "r_r_bias")}
    shared.load_state_dict(state)
    torch.testing.assert_close(shared(tokens(4), **biases), own(tokens(4)))


def test_dropout_is_on_in_training_only() -> None:
    module, x = attention(dropatt=0.5), tokens(6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)


def test_names_of_the_original() -> None:
    names = {"qkv_net.weight", "r_net.weight", "o_net.weight"}
    assert set(attention(untie_r=False).state_dict()) == names
    assert set(attention().state_dict()) == names | {"r_w_bias", "r_r_bias"}


@pytest.mark.parametrize(
    ("x", "layer_memory", "message"),
    [
        ((2, 3), None, r"x: expected \[B, T, 12\], got \[2, 3\]"),
        ((2, 3, 5), None, r"x: expected \[B, T, 12\], got \[2, 3, 5\]"),
        ((2, 3, 12), (2, 4, 7), r"layer_memory: expected \[2, T, 12\], got \[2, 4, 7\]"),
        ((2, 3, 12), (1, 4, 12), r"layer_memory: expected \[2, T, 12\], got \[1, 4, 12\]"),
    ],
)
def test_wrong_shapes_are_named(
    x: tuple[int, ...], layer_memory: tuple[int, ...] | None, message: str
) -> None:
    hidden = None if layer_memory is None else torch.zeros(layer_memory)
    with pytest.raises(ValueError, match=message):
        RelativeMultiHeadAttention(12, 2, 6)(torch.zeros(x), hidden)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="n_head: expected a positive integer, got 0"):
        RelativeMultiHeadAttention(12, 0, 6)
    with pytest.raises(ValueError, match="d_head: expected a positive integer, got -6"):
        RelativeMultiHeadAttention(12, 2, -6)
    with pytest.raises(ValueError, match="n_kv_head: expected a divisor of n_head 4, got 3"):
        RelativeMultiHeadAttention(12, 4, 6, n_kv_head=3)
    with pytest.raises(ValueError, match="cache_len: expected 0 or more tokens, got -1"):
        attention().stream(tokens(3), cache_len=-1)
