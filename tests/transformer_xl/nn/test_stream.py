"""Streaming batches whose rows have blocks of different lengths: each row equals that row alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformer_xl.nn import RelativeMultiHeadAttention

B, D_MODEL, H, D = 3, 12, 3, 4


def attention(**options: Any) -> RelativeMultiHeadAttention:
    torch.manual_seed(0)
    module = RelativeMultiHeadAttention(D_MODEL, H, D, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


Block = tuple[Tensor, list[int], list[int]]  # x [B, T, d_model], starts, lengths


def blocks_of(seed: int, n_blocks: int, filler: float = float("nan")) -> list[Block]:
    """Random blocks; frames that are not valid hold `filler`."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(n_blocks):
        T = draw.randint(0, 5)
        starts = [draw.choice([0, 0, draw.randint(0, T)]) for _ in range(B)]
        lengths = [draw.choice([T, start, draw.randint(start, T)]) for start in starts]
        x = torch.randn(B, T, D_MODEL, dtype=torch.float64, generator=generator)
        for b, (start, end) in enumerate(zip(starts, lengths, strict=True)):
            x[b, :start] = filler
            x[b, end:] = filler
        blocks.append((x.requires_grad_(), starts, lengths))
    return blocks


def stream(
    module: RelativeMultiHeadAttention, blocks: list[Block], cache_len: int
) -> tuple[list[Tensor], Any]:
    cache, outputs = None, []
    for x, starts, lengths in blocks:
        out, cache = module.stream(
            x,
            cache,
            cache_len=cache_len,
            starts=torch.tensor(starts),
            lengths=torch.tensor(lengths, dtype=torch.int32),
        )
        outputs.append(out)
    return outputs, cache


def alone(
    module: RelativeMultiHeadAttention, blocks: list[Block], b: int, cache_len: int
) -> tuple[list[Tensor], Any]:
    """The outputs of row b's valid frames, without the others, per block; the last cache."""
    cache, outputs = None, []
    for x, starts, lengths in blocks:
        row = x[b : b + 1, starts[b] : lengths[b]]
        out, cache = module.stream(row, cache, cache_len=cache_len)
        outputs.append(out[0])
    return outputs, cache


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    n_blocks=st.integers(1, 5),
    cache_len=st.integers(0, 12),
    n_kv_head=st.sampled_from([1, 3]),
    causal=st.booleans(),
    clamp_len=st.integers(-1, 6),
    window=st.none() | st.tuples(st.none() | st.integers(0, 6), st.none() | st.integers(0, 3)),
)
def test_each_row_equals_that_row_alone(
    seed: int, n_blocks: int, cache_len: int, **options: Any
) -> None:
    module, blocks = attention(**options), blocks_of(seed, n_blocks)
    outputs, cache = stream(module, blocks, cache_len)
    inputs = [x for x, *_ in blocks]
    weights = [torch.rand_like(out) for out in outputs]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    parameters = list(module.parameters())
    actual = torch.autograd.grad(loss, [*inputs, *parameters])

    expected_loss = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        expected, own = alone(module, blocks, b, cache_len)
        for out, due, weight, (_, starts, lengths) in zip(
            outputs, expected, weights, blocks, strict=True
        ):
            torch.testing.assert_close(out[b, starts[b] : lengths[b]], due)
            assert not out[b, : starts[b]].any()
            assert not out[b, lengths[b] :].any()
            expected_loss = expected_loss + (due * weight[b, starts[b] : lengths[b]]).sum()
        n_cached = cache.k.shape[2] - int(cache.start[b])
        assert n_cached == min(sum(len(due) for due in expected), cache_len)
        torch.testing.assert_close(cache.k[b, :, cache.start[b] :], own.k[0, :, own.start[0] :])
        torch.testing.assert_close(cache.v[b, :, cache.start[b] :], own.v[0, :, own.start[0] :])
    torch.testing.assert_close(
        actual, torch.autograd.grad(expected_loss, [*inputs, *parameters], materialize_grads=True)
    )


def test_a_row_pauses_and_continues() -> None:
    module = attention()
    x = torch.randn(2, 6, D_MODEL, dtype=torch.float64)
    whole = module(x)
    _, cache = module.stream(x[:, :2], cache_len=6)
    paused = torch.cat([x[:1, 2:4], torch.randn_like(x[:1, 2:4])])
    out, cache = module.stream(paused, cache, cache_len=6, lengths=torch.tensor([2, 0]))
    torch.testing.assert_close(out[0], whole[0, 2:4])
    assert not out[1].any()
    assert cache.start.tolist() == [0, 2]
    behind = torch.stack([x[0, 4:], x[1, 2:4]])
    out, cache = module.stream(behind, cache, cache_len=6)
    torch.testing.assert_close(out, torch.stack([whole[0, 4:], whole[1, 2:4]]))
    assert cache.start.tolist() == [0, 2]


def test_default_starts_and_lengths_are_the_whole_block() -> None:
    module = attention(causal=False)
    x = torch.randn(2, 4, D_MODEL, dtype=torch.float64)
    _, cache = module.stream(x, cache_len=3)
    assert cache.start.tolist() == [0, 0]
    expected = module.stream(x, cache, cache_len=3)
    for options in (
        {"starts": torch.tensor([0, -5])},
        {"lengths": torch.tensor([4, 99])},
        {"starts": torch.zeros(2, dtype=torch.int32), "lengths": torch.tensor([4, 4])},
    ):
        torch.testing.assert_close(module.stream(x, cache, cache_len=3, **options), expected)
    out, after = module.stream(x, cache, cache_len=3, starts=torch.tensor([3, 0]))
    assert not out[0, :3].any()
    torch.testing.assert_close(out[1], expected[0][1])
    torch.testing.assert_close(after.k[0, :, :2], cache.k[0, :, 1:])
    out, after = module.stream(x, cache, cache_len=3, starts=torch.full((2,), 9))
    assert not out.any()
    torch.testing.assert_close(after, cache)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": [4, 4]}, TypeError, "stream: lengths must be a tensor, got list"),
        ({"lengths": torch.ones(2)}, TypeError, "stream: lengths must be torch.int32 or"),
        ({"starts": torch.ones(3).long()}, ValueError, r"stream: starts must have shape \[2\]"),
        ({"starts": torch.ones(2, 1).long()}, ValueError, r"starts must .* got \[2, 1\]"),
    ],
)
def test_wrong_ranges_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attention().stream(torch.zeros(2, 4, D_MODEL).double(), cache_len=2, **options)
