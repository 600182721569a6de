"""The conventions of NeMo's encoders, written out in a few lines, against their adapters."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import nemo, nemo_masks, patch, report, unpatch

B, T, H, D = 2, 17, 2, 6
STYLES = {
    "full": ("regular", [-1, -1]),
    "window": ("regular", [4, 2]),
    "left_only": ("regular", [3, -1]),
    "causal": ("regular", [-1, 0]),
    "chunks": ("chunked_limited", [6, 2]),
    "chunks-all_left": ("chunked_limited", [-1, 3]),
    "chunks-open_right": ("chunked_limited", [5, -1]),
    "right_context": ("chunked_limited_with_rc", [4, 3, 2]),
    "right_context-none": ("chunked_limited_with_rc", [3, 1, 0]),
    "right_context-full": ("chunked_limited_with_rc", [-1, -1, -1]),
}


@pytest.fixture(autouse=True)
def library(monkeypatch):
    names = {"avoid_float16_autocast_context": contextlib.nullcontext}
    names["MultiHeadAttention"] = RelPositionMultiHeadAttention
    monkeypatch.setitem(sys.modules, nemo_masks.ATTENTIONS, types.SimpleNamespace(**names))
    module = types.SimpleNamespace(ConformerEncoder=ConformerEncoder)
    monkeypatch.setitem(sys.modules, nemo_masks.ENCODERS[0][0], module)
    yield
    unpatch()


class RelPositionMultiHeadAttention(nn.Module):
    """The attributes and methods that the adapters read."""

    __module__ = nemo_masks.ATTENTIONS

    def __init__(self, context: tuple[int, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("linear_q", "linear_k", "linear_v", "linear_pos", "linear_out"):
            setattr(self, name, nn.Linear(H * D, H * D))
        self.pos_bias_u, self.pos_bias_v = nn.Parameter(torch.randn(2, H, D)).unbind()
        self.h, self.s_d_k, self.dropout = H, D**0.5, nn.Dropout(0.0)
        self.use_pytorch_sdpa = False
        self.att_context_size = context

    def forward_qkv(self, *x: Tensor) -> list[Tensor]:
        layers = (self.linear_q, self.linear_k, self.linear_v)
        return [heads(layer(y)) for layer, y in zip(layers, x, strict=True)]

    def update_cache(self, key, value, query, cache):
        if cache is None:
            return key, value, query, None
        joined = torch.cat([cache, key], 1)
        return joined, joined, query, joined[:, -cache.shape[1] :]

    def forward(self, query, key, value, mask, pos_emb, cache=None):
        raise AssertionError("the original code runs")


class ConformerEncoder(nn.Module):
    """An encoder that returns its masks as the layers receive them."""

    __module__ = nemo_masks.ENCODERS[0][0]
    self_attention_model, att_context_style = "rel_pos", "chunked_limited"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RelPositionMultiHeadAttention() for _ in range(2))

    def forward(self) -> Tensor:
        return self.forward_internal()

    def forward_internal(self) -> Tensor:
        return self._create_masks(
            att_context_size=[6, 2],
            padding_length=torch.tensor([T, 9]),
            max_audio_length=T,
            offset=None,
            device=torch.device("cpu"),
        )[1]

    def _create_masks(self, att_context_size, padding_length, max_audio_length, offset, device):
        return None, torch.ones(len(padding_length), T, T, dtype=torch.bool)


class Derived(ConformerEncoder):
    def forward_internal(self) -> Tensor:
        return super().forward_internal()


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (H, D)).transpose(1, 2)


def attend(
    module: RelPositionMultiHeadAttention, x: Tensor, keys: Tensor, rows: Tensor, sees: Tensor
) -> Tensor:
    """With a row of positions for each pair: rows [H, Tq, Tk, D], sees bool [B, Tq, Tk]."""
    q, k, v = module.forward_qkv(x, keys, keys)
    u, w = module.pos_bias_u[:, None], module.pos_bias_v[:, None]
    scores = ((q + u) @ k.mT + torch.einsum("bhid,hijd->bhij", q + w, rows)) / module.s_d_k
    probs = scores.masked_fill(~sees[:, None], -1e4).softmax(-1).masked_fill(~sees[:, None], 0.0)
    return module.linear_out((probs @ v).transpose(1, 2).flatten(2))


def frames_seen(style: str, context: list[int], n: int) -> Tensor:
    """Bool [n, n]: which frame each frame attends to, without padding."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    left, right = context[0], context[-1]
    if style == "chunked_limited_with_rc" and min(context) >= 0:
        begin = i // context[1] * context[1]
        return (j >= begin - left) & (j <= begin + context[1] - 1 + right)
    if style == "chunked_limited" and right >= 0:
        chunks = i // (right + 1) - j // (right + 1)
        return (chunks >= 0) & ((chunks <= left // (right + 1)) | (left < 0))
    return ((i - j <= left) | (left < 0)) & ((j - i <= right) | (right < 0))


def encoder(style: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(att_context_style=style, self_attention_model="rel_pos")


@pytest.mark.parametrize("n_cached", [None, 0, 5], ids=["no_cache", "empty_cache", "cache"])
@pytest.mark.parametrize("case", STYLES)
def test_ranges_of_every_style(case, n_cached):
    style, context = STYLES[case]
    C = 0 if n_cached is None else 5  # the size of the cache, with `n_cached` frames at its end
    lengths = torch.tensor([T, 9]) + C
    offset = None if n_cached is None else torch.tensor([C - n_cached, C])
    padded, ranges = nemo_masks.build(None)(encoder(style), context, lengths, C + T, offset, "cpu")
    frame = torch.arange(C + T)
    valid = frame < lengths[:, None]
    if offset is not None:
        valid &= frame >= offset[:, None]
    assert torch.equal(padded, ~valid)
    sees = frames_seen(style, context, C + T) & valid[:, None] & valid[..., None]
    assert ranges.shape == (B, C + T, 2)
    found = (frame >= ranges[..., :1]) & (frame < ranges[..., 1:])
    assert torch.equal(found, sees)


@pytest.mark.parametrize("n_cached", [0, 5])
@pytest.mark.parametrize("case", ["full", "chunks", "right_context"])
def test_attention_over_ranges_equals_the_formula(case, n_cached):
    style, context = STYLES[case]
    module, Tk = RelPositionMultiHeadAttention(), T + n_cached
    x, keys = torch.randn(B, T, H * D), torch.randn(B, Tk, H * D)
    keys[:, n_cached:] = x
    table = torch.randn(1, 2 * Tk - 1, H * D)
    lengths, offset = torch.tensor([Tk, n_cached + 9]), torch.tensor([0, n_cached])
    _, ranges = nemo_masks.build(None)(encoder(style), context, lengths, Tk, offset, "cpu")
    ranges = ranges[:, n_cached:]  # as the encoder does
    j = torch.arange(Tk)
    sees = (j >= ranges[..., :1]) & (j < ranges[..., 1:])
    assert not bool(sees.any(-1).all())  # padded queries see nothing
    distance = torch.arange(n_cached, Tk)[:, None] - j
    rows = heads(module.linear_pos(table))[0][:, Tk - 1 - distance]
    expected = attend(module, x, keys, rows, sees)
    cache = keys[:, :n_cached] if n_cached else None
    for mask in (ranges, ~sees):
        out = nemo.attention(module, x, x, x, mask, table, cache)
        assert isinstance(out, tuple) == (cache is not None)
        torch.testing.assert_close(out[0] if cache is not None else out, expected)


def test_ranges_for_another_cache_are_an_error():
    module, x = RelPositionMultiHeadAttention(), torch.randn(B, T, H * D)
    ranges, table = torch.zeros(B, T, 2, dtype=torch.int64), torch.randn(1, 2 * T + 3, H * D)
    with pytest.raises(ValueError, match=f"expected {T + 2} frames in the cache and the block"):
        nemo.attention(module, x, x, x, ranges, table)


@pytest.mark.parametrize("uses_sdpa", [False, True])
def test_dropout_follows_the_mode_of_its_layer_or_of_the_module(uses_sdpa):
    """torch's sdpa gets the rate in training; otherwise the library calls its dropout layer."""
    module, x = RelPositionMultiHeadAttention().eval(), torch.randn(B, T, H * D)
    module.use_pytorch_sdpa, module.dropout.p = uses_sdpa, 0.5
    args = (x, x, x, None, torch.randn(1, 2 * T - 1, H * D))
    expected = nemo.attention(module, *args)
    module.train().dropout.eval()
    assert torch.equal(nemo.attention(module, *args), expected) != uses_sdpa
    module.eval().dropout.train()
    assert torch.equal(nemo.attention(module, *args), expected) == uses_sdpa


@pytest.mark.parametrize(
    "context", [(3, 3), (4, 0), (5, 1), (5, 3), (0, 4), (1, 5), (3, 5)], ids=str
)
def test_columns_of_the_local_attention(context):
    """The library adds the scores of `left` rows to the first columns of its band of 2w + 1, and
    those of the other rows to the last ones, also where left or right is less than w."""
    (left, right), w = context, max(context)
    module, x = RelPositionMultiHeadAttention(context), torch.randn(B, T, H * D)
    table = torch.randn(1, left + right + 1, H * D)
    r = heads(module.linear_pos(table))[0]  # [H, left + right + 1, D]
    band = torch.zeros(H, 2 * w + 1, D)  # column c is distance w - c
    band[:, :left] += r[:, :left]
    band[:, 2 * w - right :] += r[:, left:]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    rows = band[:, (w - distance).clamp(0, 2 * w)]
    padded = torch.arange(T) >= torch.tensor([[T], [11]])
    padded[0, 4] = True  # need not be at the end
    sees = (distance <= left) & (-distance <= right) & ~padded[:, None] & ~padded[..., None]
    expected = attend(module, x, x, rows, sees)
    torch.testing.assert_close(nemo.local_attention(module, x, x, x, padded, table), expected)


def test_an_encoder_makes_ranges_if_all_its_attentions_are_patched():
    encoder = ConformerEncoder()
    own = type(encoder)
    assert len(patch(encoder, force=True).patched) == 3
    assert type(encoder).forward is own.forward
    assert encoder().shape == (B, T, 2)
    assert report(encoder).fallbacks == 0
    unpatch(encoder.layers[1])
    assert encoder().shape == (B, T, T)
    assert "not all of its attention layers are patched" in str(report(encoder))
    encoder._create_masks = lambda **options: (None, torch.zeros(1))
    assert "has replaced its _create_masks" in str(report(encoder))
    del encoder._create_masks
    assert not unpatch(encoder).patched
    assert type(encoder) is own


def test_encoders_that_the_ranges_may_not_fit_are_left_alone():
    for encoder, reason in (
        (Derived(), "another forward_internal"),
        (ConformerEncoder(), "self_attention_model is 'rope'"),
        (ConformerEncoder(), "att_context_style is 'new'"),
    ):
        if "rope" in reason:
            encoder.self_attention_model = "rope"
        if "new" in reason:
            encoder.att_context_style = "new"
        found = patch(encoder, force=True)
        assert reason in str(found)
        assert len(found.patched) == 2
        assert encoder().shape == (B, T, T)
