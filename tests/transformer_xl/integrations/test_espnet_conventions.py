"""The conventions of ESPnet's attention and of classes with its parameters, written out: `patch`
finds the family that computes the same, and leaves all other classes alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import espnet, patch, report, unpatch
from transformer_xl.integrations.adapter import adapter_of

B, T, H, D = 2, 9, 3, 5
VALID = torch.arange(T) < torch.tensor([[T], [6]])


class Attention(nn.Module):
    """The parameters that these classes share, and the formula, a matrix at a time."""

    def __init__(self, zero_triu: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("q", "k", "v", "out", "pos"):
            setattr(self, f"linear_{name}", nn.Linear(H * D, H * D, bias=name != "pos"))
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.randn(H, D)) for _ in range(2))
        self.dropout, self.zero_triu, self.attn = nn.Dropout(0.0), zero_triu, None

    def forward_qkv(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        pairs = ((self.linear_q, query), (self.linear_k, key), (self.linear_v, value))
        return tuple(self.heads(layer(x)) for layer, x in pairs)

    @staticmethod
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (H, D)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, keep: Tensor) -> Tensor:
        """Row m of the table has the distance Tk - 1 - m; rows without keys get 0."""
        distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        distance = distance - torch.arange(k.shape[2])
        r = self.heads(self.linear_pos(table))
        row = r[:, :, k.shape[2] - 1 - distance]  # [1, H, Tq, Tk, D]
        positions = torch.einsum("bhid,ahijd->bhij", q + self.pos_bias_v[:, None], row)
        if self.zero_triu:
            positions = positions.masked_fill(distance < 0, 0.0)
        scores = ((q + self.pos_bias_u[:, None]) @ k.mT + positions) * D**-0.5
        self.attn = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num()
        return self.linear_out((self.attn @ v).transpose(1, 2).flatten(2))


class EspnetAttention(Attention):
    def forward(self, query, key, value, pos_emb, mask):
        q, k, v = self.forward_qkv(query, key, value)
        keep = torch.tensor(True) if mask is None else mask[:, None] != 0
        return self.attend(q, k, v, pos_emb, keep)


class InvertedAttention(EspnetAttention):
    """The arguments of ESPnet's class with a mask that is nonzero for padding."""

    def forward(self, query, key, value, pos_emb, mask):
        return super().forward(query, key, value, pos_emb, mask == 0)


class CachedAttention(Attention):
    """CosyVoice's and Chatterbox's."""

    no_mask, no_cache = torch.ones(0, 0, 0).bool(), torch.zeros(0, 0, 0, 0)
    no_table = torch.empty(0)

    def forward(self, query, key, value, mask=no_mask, pos_emb=no_table, cache=no_cache):
        q, k, v = self.forward_qkv(query, key, value)
        if len(cache) > 0:
            k, v = torch.cat([cache[..., :D], k], 2), torch.cat([cache[..., D:], v], 2)
        keep = mask[:, None, :, : k.shape[2]] if mask.numel() else torch.tensor(True)
        return self.attend(q, k, v, pos_emb, keep), torch.cat([k, v], -1)


class InvertedCachedAttention(CachedAttention):
    """The arguments of CosyVoice's class with a mask that is True for padding, as NeMo's is."""

    no_mask, no_table, no_cache = (
        getattr(CachedAttention, name) for name in ("no_mask", "no_table", "no_cache")
    )

    def forward(self, query, key, value, mask=no_mask, pos_emb=no_table, cache=no_cache):
        return super().forward(query, key, value, ~mask, pos_emb, cache)


class UnshiftedAttention(CachedAttention):
    """WeNet's formula: row j of the table belongs to key j. Here, a longer table is cut."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, keep: Tensor) -> Tensor:
        positions = (q + self.pos_bias_v[:, None]) @ self.heads(self.linear_pos(table)).mT
        scores = ((q + self.pos_bias_u[:, None]) @ k.mT + positions[..., : k.shape[2]]) * D**-0.5
        probs = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num()
        return self.linear_out((probs @ v).transpose(1, 2).flatten(2))


class TransducerAttention(Attention):
    """ESPnet2's streaming transducers; masks are True for keys without attention."""

    def forward(self, query, key, value, pos_enc, mask, chunk_mask=None, left_context=0):
        q, k, v = self.forward_qkv(query, key, value)
        drop = mask[:, None, None]
        drop = drop if chunk_mask is None else drop | chunk_mask
        first = pos_enc.shape[1] - (k.shape[2] + q.shape[2] - 1)
        assert first >= 0
        padding = pos_enc.new_zeros(1, k.shape[2] - q.shape[2], H * D)
        return self.attend(q, k, v, torch.cat([pos_enc, padding], 1), ~drop)


class TimeFirstAttention(Attention):
    """fairseq's: [T, B, D], and a mask [B, T] that is True for padding."""

    def forward(self, query, key, value, pos_emb, key_padding_mask=None, **kwargs):
        q, k, v = self.forward_qkv(*(x.transpose(0, 1) for x in (query, key, value)))
        keep = ~key_padding_mask[:, None, None]
        return self.attend(q, k, v, pos_emb.transpose(0, 1), keep).transpose(0, 1), None


@pytest.fixture(autouse=True)
def own_code_afterwards():
    yield
    unpatch()


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(B, T, H * D, generator=GENERATOR)
TABLE = torch.randn(1, 2 * T - 1, H * D, generator=GENERATOR)
BAND = VALID[:, None] & ((torch.arange(T)[:, None] - torch.arange(T)).abs() < 4)
CALLS = {
    "padded": (EspnetAttention, "espnet", (X, X, X, TABLE, VALID[:, None])),
    "left_padded": (EspnetAttention, "espnet", (X, X, X, TABLE, VALID[:, None].flip(2).int())),
    "one_mask": (EspnetAttention, "espnet", (X, X, X, TABLE, VALID[1:, None])),
    "two_ranges": (EspnetAttention, "espnet", (X, X, X, TABLE, torch.arange(T)[None, None] != 3)),
    "band": (EspnetAttention, "espnet", (X, X, X, TABLE, BAND)),
    "no_mask": (EspnetAttention, "espnet", (X, X, X, TABLE, None)),
    "last_frame": (EspnetAttention, "espnet", (X[:, -1:], X, X, TABLE, VALID[:, None])),
    "no_cache": (CachedAttention, "chatterbox", (X, X, X, VALID[:, None], TABLE)),
    "empty_mask": (CachedAttention, "chatterbox", (X, X, X, torch.ones(0, 0, 0), TABLE)),
    "transducer": (TransducerAttention, "espnet", (X, X, X, TABLE, ~VALID)),
    "chunks": (TransducerAttention, "espnet", (X, X, X, TABLE, ~VALID, ~BAND[0])),
    "left_context": (
        TransducerAttention,
        "espnet",
        (X[:, 3:], X, X, TABLE[:, : 2 * T - 4], ~VALID, None, 3),
    ),
    "time_first": (
        TimeFirstAttention,
        "fairseq",
        (*(x.transpose(0, 1) for x in (X, X, X, TABLE)), ~VALID),
    ),
}


def outcome(module: nn.Module, args: tuple) -> dict[str, Tensor]:
    module.zero_grad()
    out = module(*args)
    out = out[0] if isinstance(out, tuple) else out
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {"out": out.detach(), **{n: p.grad.clone() for n, p in module.named_parameters()}}


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "zero_triu"])
@pytest.mark.parametrize("name", CALLS)
def test_a_convention_is_found_and_computed(name, is_causal):
    kind, family, args = CALLS[name]
    module = kind(is_causal)
    expected = outcome(module, args)
    entry = patch(module).entries[0]
    assert (entry.patched, entry.family) == (True, family), entry.reason
    assert adapter_of(module) is not None
    actual = outcome(module, args)
    for key, x in expected.items():
        torch.testing.assert_close(actual[key], x, rtol=1e-4, atol=1e-4, msg=f"{name}: {key}")
    assert report(module).fallbacks == 0


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        (InvertedAttention, (X, X, X, TABLE, VALID[:, None])),
        (InvertedCachedAttention, (X, X, X, VALID[:, None], TABLE)),
        (UnshiftedAttention, (X, X, X, VALID[:, None], TABLE)),
    ],
)
def test_classes_with_another_formula_or_mask_are_left_alone(kind, args):
    module = kind()
    expected = outcome(module, args)
    entry = patch(module).entries[0]
    assert not entry.patched
    assert "another result (difference" in entry.reason
    torch.testing.assert_close(outcome(module, args), expected, rtol=0, atol=0)


def test_a_trace_keeps_the_original_code():
    """Its mask may have padding in later calls."""
    module, whole = EspnetAttention(), torch.ones(B, 1, T, dtype=torch.bool)
    args = (X, X, X, TABLE)
    expected = module(*args, VALID[:, None])
    patch(module)
    traced = torch.jit.trace(module, (*args, whole), check_trace=False)
    assert "txl" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*args, VALID[:, None]), expected)
    assert "traced for TorchScript" in str(report(module))


def test_an_exported_program_has_the_kernels():
    module, whole = EspnetAttention(), torch.ones(B, 1, T, dtype=torch.bool)
    args = (X, X, X, TABLE)
    expected = module(*args, VALID[:, None])
    patch(module)
    program = torch.export.export(module, (*args, whole))
    assert "txl" in str(program.graph)
    torch.testing.assert_close(program.module()(*args, VALID[:, None]), expected)


def test_the_comparison_does_not_need_leaves():
    """After a call, these classes keep the probabilities, which cannot be copied."""
    module = EspnetAttention()
    module.attn = module.pos_bias_u * 2
    assert patch(module).patched
    module(X, X, X, TABLE, None)
    assert module.attn is None


def test_a_cache_of_blocks():
    module = CachedAttention()

    def stream() -> tuple[Tensor, Tensor]:
        cache, outputs = torch.zeros(0, 0, 0, 0), []
        for i in range(0, T, 3):
            rows = TABLE[:, T - 3 - i : T + 2 + i]  # distances 2 + i to -(2 + i)
            block = X[:, i : i + 3]
            out, cache = module(block, block, block, pos_emb=rows, cache=cache)
            outputs.append(out)
        return torch.cat(outputs, 1), cache

    expected = stream()
    patch(module)
    torch.testing.assert_close(stream(), expected, rtol=1e-4, atol=1e-5)
    assert report(module).fallbacks == 0


@pytest.mark.parametrize(
    ("kind", "args", "reason"),
    [
        (EspnetAttention, (X, X[:, 2:], X[:, 2:], TABLE, None), "more queries than keys"),
        (EspnetAttention, (X, X, X, TABLE[:, 2:], None), "does not have 2 Tk - 1 rows"),
        (EspnetAttention, (X, X, X, TABLE, VALID), "no tensor of three dimensions"),
        (CachedAttention, (X, X, X), "no position embeddings are given"),
        (TransducerAttention, (X, X, X, TABLE, ~VALID, None, 1), "left_context is not"),
        (TransducerAttention, (X, X, X, TABLE[:, 1:], ~VALID), "fewer than Tk + Tq - 1 rows"),
        (TransducerAttention, (X, X, X, TABLE, VALID.int()), "no bool tensor"),
    ],
)
def test_calls_that_are_not_served_run_the_original_code(kind, args, reason):
    module = kind()
    expected = result(module, args)
    assert patch(module).patched
    actual = result(module, args)
    assert actual == expected if isinstance(expected, type) else torch.equal(actual, expected)
    assert report(module).fallbacks == 1
    assert reason in str(report(module))


def result(module: nn.Module, args: tuple) -> Tensor | type[Exception]:
    """The output, or the class of the error that the original code raises."""
    try:
        out = module(*args)
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        return type(error)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", ["padded", "no_cache", "transducer", "time_first"])
def test_a_hook_may_read_the_attention_weights(name):
    """ESPnet's trainer registers such hooks for its plots of attention weights."""
    kind, _, args = CALLS[name]
    module, read = kind(), []
    patch(module)
    hook = module.register_forward_hook(lambda module, *_: read.append(module.attn.detach()))
    module(*args)
    assert read[0].shape == (B, H, T, T)
    assert report(module).entries[0].fallbacks == {"a hook may read the attention weights": 1}
    hook.remove()
    module(*args)
    assert module.attn is None
    assert report(module).fallbacks == 1


def test_ranges_are_kept_until_the_mask_changes(monkeypatch):
    calls, own = [], espnet.ranges_of_padding
    monkeypatch.setattr(espnet, "ranges_of_padding", lambda rows: calls.append(1) or own(rows))
    mask = VALID[:, None].clone()
    for _ in range(3):
        assert espnet.which_keys(mask, B)["key_lens"].tolist() == [T, 6]
    assert len(calls) == 1
    mask[:, :, 4:] = False
    assert espnet.which_keys(mask, B)["key_lens"].tolist() == [4, 4]
    assert espnet.which_keys(mask[:, 0], B, marks_padding=True)["key_start"].tolist() == [4, 4]
    with torch.inference_mode():
        assert espnet.which_keys(mask.clone(), B)["key_lens"].tolist() == [4, 4]
        # A training step may use the ranges that an evaluation before it has made.
        ranges = espnet.which_keys(VALID[:, None], B)
    assert not any(x.is_inference() for x in ranges.values())
