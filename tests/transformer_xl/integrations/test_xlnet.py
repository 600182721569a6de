"""XLNet's convention, written out in a few lines, against its adapter."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import xlnet, xlnet_model

B, T, H, D, N_MODEL = 2, 9, 3, 8, 24


class Attention(nn.Module):
    """The parameters of one layer and the code after its attention."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("q", "k", "v", "o", "r"):
            setattr(self, name, nn.Parameter(torch.randn(N_MODEL, H, D) * 0.3))
        for name in ("r_w_bias", "r_r_bias", "r_s_bias"):
            setattr(self, name, nn.Parameter(torch.randn(H, D)))
        self.seg_embed = nn.Parameter(torch.randn(2, H, D))
        self.scale, self.dropout = D**-0.5, nn.Dropout(p)

    def post_attention(self, h: Tensor, out: Tensor) -> Tensor:
        return h + torch.einsum("ibnd,hnd->ibh", out, self.o)


def heads(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("ibh,hnd->bnid", x, weight)


def probabilities(
    module: Attention,
    q: Tensor,  # [B, H, T, D]
    cat: Tensor,  # [Tk, B, N_MODEL], memory and content stream
    table: Tensor,  # [Tk + T, 1 or B, N_MODEL], row m is distance Tk - m
    segment: Tensor,  # [Tk, B]
    sees: Tensor,  # bool, broadcastable to [B, H, T, Tk]
) -> Tensor:
    """[B, H, T, Tk], from one element of each tensor per pair of query and key."""
    Tk, k = len(cat), heads(cat, module.k)
    distance = torch.arange(T)[:, None] + Tk - T - torch.arange(Tk)
    row = heads(table, module.r)[:, :, Tk - distance]  # [1 or B, H, T, Tk, D]
    differs = (segment[-T:, None] != segment).permute(2, 0, 1).long()  # [B, T, Tk]
    embedding = module.seg_embed[differs].permute(0, 3, 1, 2, 4)  # [B, H, T, Tk, D]
    content, position, of_segment = (
        (q + bias[:, None])[..., None, :]
        for bias in (module.r_w_bias, module.r_r_bias, module.r_s_bias)
    )
    scores = content * k[:, :, None] + position * row + of_segment * embedding
    scores = (scores.sum(-1) * module.scale).masked_fill(~sees, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def attend(module: Attention, q: Tensor, cat: Tensor, *others: Tensor) -> Tensor:
    """[T, B, H, D]"""
    probs = probabilities(module, q, cat, *others)
    return (probs @ heads(cat, module.v)).permute(2, 0, 1, 3)


def example(n_memory: int, n_table: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, the memory, the table, the segments of memory and tokens."""
    torch.manual_seed(1)
    h, mems = torch.randn(T, B, N_MODEL), torch.randn(n_memory, B, N_MODEL)
    table = torch.randn(n_memory + 2 * T, n_table, N_MODEL)
    ids = torch.tensor([0, 0, 0, 5, 5, 0, 1, 1, 7])[:, None].expand(T, B)
    return h, mems, table, torch.cat([torch.zeros(n_memory, B, dtype=torch.long), ids])


def rows_with_padding(begin: int, end: int) -> Tensor:
    """[B, T]: 1 for the padding of the second row."""
    padding = torch.zeros(B, T)
    padding[1, begin:end] = 1
    return padding


PADDING = {
    "none": None,
    "left": rows_with_padding(0, 3),
    "right": rows_with_padding(6, T),
    "hole": rows_with_padding(2, 4),
    "row": rows_with_padding(0, T),
}


@pytest.mark.parametrize("n_memory", [0, 4])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("is_permuted", [False, True], ids=["all", "permuted"])
def test_two_streams_with_segments_and_memory(is_permuted, padding, n_memory):
    """The first token of a permutation sees no key in the query stream, without memory."""
    module, (h, mems, table, segment) = Attention().double(), example(n_memory)
    h, mems, table = h.double(), mems.double(), table.double()
    order = torch.stack([torch.randperm(T) for _ in range(B)])
    perm_mask = (order[:, :, None] <= order[:, None]).float() if is_permuted else None
    excluded = torch.zeros(B, T, T) if perm_mask is None else perm_mask
    if PADDING[padding] is not None:
        excluded = excluded + PADDING[padding][:, None]
    sees = nn.functional.pad(excluded == 0, (n_memory, 0), value=True)[:, None]  # [B, 1, T, Tk]
    is_own = torch.arange(n_memory + T) == torch.arange(T)[:, None] + n_memory
    g, mapping = torch.randn(3, B, N_MODEL).double(), torch.rand(3, T, B).double()
    cat = torch.cat([mems, h])
    q_g = torch.einsum("bnmd,mlb->bnld", heads(g, module.q), mapping)
    out_h = attend(module, heads(h, module.q), cat, table, segment, sees | is_own)
    out_g = attend(module, q_g, cat, table, segment, sees)
    out_g = torch.einsum("lbnd,mlb->mbnd", out_g, mapping)
    expected = module.post_attention(h, out_h), module.post_attention(g, out_g)

    masks = xlnet_model.masks(None, PADDING[padding], perm_mask, n_memory)
    segments = xlnet_model._segments(segment[n_memory:].T, n_memory)
    actual = xlnet.attention(module, h, g, *masks, table, segments, mems, mapping)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("same_length", [False, True])
def test_causal_stream_whose_rows_have_other_tables(same_length):
    n_memory = 4
    module, (h, mems, table, segment) = Attention(), example(n_memory, n_table=B)
    distance = torch.arange(T)[:, None] + n_memory - torch.arange(n_memory + T)
    sees = (distance >= 0) & ((distance <= n_memory) | (not same_length))
    out = attend(module, heads(h, module.q), torch.cat([mems, h]), table, segment, sees)
    settings = types.SimpleNamespace(same_length=same_length)
    ranges = xlnet_model._causal_ranges(settings, T, n_memory, B, h.device)
    segments = xlnet_model._segments(segment[n_memory:].T, n_memory)
    table = table[: n_memory + T + 1]  # down to distance 0
    actual, _ = xlnet.attention(module, h, None, ranges, ranges, table, segments, mems)
    torch.testing.assert_close(actual, module.post_attention(h, out), rtol=1e-4, atol=1e-5)


def test_dropout_of_probabilities():
    """Mean and variance, also with the own key of padded tokens, which the kernel does not read."""
    n_copy, p = 4000, 0.25
    module, (h, _, table, segment) = Attention(p), example(0)
    module.post_attention = lambda h, out: out
    x, padding = h[:, :1].expand(-1, n_copy, -1), PADDING["right"][1:]
    ranges, _ = xlnet_model.masks(None, padding.expand(n_copy, -1), None, 0)
    segments = xlnet_model._segments(segment[:, :1].T.expand(n_copy, -1), 0)
    with torch.no_grad():
        out, _ = xlnet.attention(module.train(), x, None, ranges, None, table, segments)
        h, sees = h[:, :1], (padding == 0)[:, None, None] | torch.eye(T).bool()
        probs = probabilities(module, heads(h, module.q), h, table, segment[:, :1], sees)
        v = heads(h, module.v)
        mean, variance = probs @ v, p / (1 - p) * probs.square() @ v.square()
    mean, variance = (y[0].transpose(0, 1) for y in (mean, variance))
    assert bool(((out.mean(1) - mean).abs() < 5 * (variance / n_copy).sqrt()).all())
    torch.testing.assert_close(out.var(1), variance, rtol=0.15, atol=0)


def test_masks_without_all_pairs():
    masks = xlnet_model.masks
    assert masks(None, None, None, 4) == (None, None)
    assert masks(torch.ones(B, T), None, None, 4) == (None, None)
    ranges, same = masks(1 - PADDING["right"], None, None, 4)
    assert ranges is same
    assert ranges.tolist() == [[0, 0], [T + 4, 6 + 4]]
    assert masks(None, PADDING["left"], None, 0)[0].tolist() == [[0, 3], [T, T]]
    # Memory, padding, tokens: two ranges of keys.
    assert masks(None, PADDING["left"], None, 4)[1].shape == (B, 1, 1, T + 4)


def test_dropout_follows_the_mode_of_its_layer():
    """As in the original, which calls the layer."""
    module, (h, _, table, _) = Attention(p=0.5).eval(), example(0)
    expected, _ = xlnet.attention(module, h, None, None, None, table, None)
    module.train().dropout.eval()
    actual, _ = xlnet.attention(module, h, None, None, None, table, None)
    assert torch.equal(actual, expected)
    module.eval().dropout.train()
    assert not torch.equal(xlnet.attention(module, h, None, None, None, table, None)[0], expected)


def test_no_value_is_read_while_a_cuda_graph_is_captured(monkeypatch):
    padding, module = torch.ones(B, T), types.SimpleNamespace(layer=(), attn_type="bi")
    ids = torch.zeros(B, T, dtype=torch.int64)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)

    def reason() -> str | None:
        return xlnet_model.unserved(module, ids, token_type_ids=ids, output_attentions=False)

    assert xlnet_model.masks(padding, None, None, 0) == (None, None)
    assert reason() is None
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    h, g = xlnet_model.masks(padding, None, None, 0)
    assert (h.shape, g.shape) == ((B, 1, T, T), (B, 1, 1, T))
    assert "segments cannot be counted" in reason()
