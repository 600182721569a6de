"""The functions of docs/mappings.md against restatements of the classes that they replace."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

PATH = Path(__file__).with_name("restatements.py")
spec = importlib.util.spec_from_file_location("restatements", PATH)
assert spec is not None
assert spec.loader is not None
restatements = importlib.util.module_from_spec(spec)
spec.loader.exec_module(restatements)

B, T, H, D, M, C = (getattr(restatements, name) for name in "BTHDMC")
VALID = torch.arange(T) < torch.tensor([T, 7, 4])[:, None]
WITH_EMPTY = torch.arange(T) < torch.tensor([T, 7, 0])[:, None]  # the last row sees no key
EVERYTHING: Any = ...
BIASES = {"pos_bias_u": (H, D), "pos_bias_v": (H, D)}
CONFORMER = ["linear_q", "linear_k", "linear_v", "linear_out", "linear_pos"]
Case = tuple[nn.Module, dict[str, Any], Any]


def module(
    linear: list[str], shapes: dict[str, tuple[int, ...]], rate: float = 0.0, **attributes: Any
) -> nn.Module:
    """A module with linear layers C -> C, parameters of these shapes, and attributes."""
    m = nn.Module()
    for name in linear:
        setattr(m, name, nn.Linear(C, C))
    for name, shape in shapes.items():
        setattr(m, name, nn.Parameter(torch.randn(shape)))
    for name, value in attributes.items():
        setattr(m, name, OfProbabilities(rate) if value is nn.Dropout else value)
    return m


class OfProbabilities(nn.Dropout):
    """Dropout of [B, H, Tq, Tk] only: a later one must not hide a missing one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else x


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * C, C)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.linear(torch.cat([x, y], -1))


class Sines(nn.Module):
    """A table of positions, with the two names under which the classes compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_proj = nn.Linear(C, C)
        self.frequencies = nn.Buffer(torch.linspace(0.1, 3, C))

    def _get_timing_signal_1d_pos(self, distances: Tensor, dtype: torch.dtype) -> Tensor:
        return (distances[..., None] * self.frequencies).sin().to(dtype)

    def forward(self, n: int) -> Tensor:
        return (torch.arange(n - 1, -1, -1)[:, None, None] * self.frequencies).sin()


def conformer(rate: float, **attributes: Any) -> nn.Module:
    return module(CONFORMER, BIASES, rate, dropout=nn.Dropout, **attributes)


def fastspeech2_conformer(rate: float) -> Case:
    inputs = {"attention_mask": WITH_EMPTY[:, None].long(), "pos_emb": torch.randn(1, 2 * T - 1, C)}
    m = conformer(rate, num_heads=H)
    return m, {"hidden_states": torch.randn(B, T, C), **inputs}, EVERYTHING


def speechbrain(rate: float) -> Case:
    shapes = {"in_proj_weight": (3 * C, C), "value_bias_weight": (C,)}
    shapes |= {"pos_bias_u": (D, H), "pos_bias_v": (D, H)}
    sizes = {"num_heads": H, "head_dim": D, "scale": C**-0.5, "vbias": True}
    m = module(["linear_pos", "out_proj"], shapes, rate, dropout_att=nn.Dropout, **sizes)
    inputs = {"pos_embs": torch.randn(1, 2 * T - 1, C), "key_padding_mask": ~WITH_EMPTY}
    return m, {"x": torch.randn(B, T, C), **inputs}, EVERYTHING


def icefall_conformer(rate: float) -> Case:
    m = module(["linear_pos", "out_proj"], BIASES, num_heads=H, dropout=rate)
    m.in_proj = nn.Linear(C, 3 * C)
    inputs = {"pos_emb": torch.randn(1, 2 * T - 1, C), "key_padding_mask": ~WITH_EMPTY}
    return m, {"x": torch.randn(T, B, C), **inputs}, EVERYTHING


def _gemma(layers: list[str], **attributes: Any) -> nn.Module:
    attributes |= {"num_heads": H, "max_past_horizon": 2, "max_future_horizon": 1, "q_scale": 0.4}
    attributes["attention_logits_soft_cap"] = 2.0
    return module(["q_proj", "k_proj", "v_proj", *layers], {"per_dim_scale": (D,)}, **attributes)


def gemma3n_audio(rate: float) -> Case:
    m = _gemma([], relative_position_embedding=Sines())
    return m, {"hidden_states": torch.randn(B, T, C), "mask": ~VALID}, VALID


def gemma4_audio(rate: float) -> Case:
    inputs = {"position_embeddings": torch.randn(1, 4, C), "n_valid": VALID.sum(1)}
    m = _gemma(["relative_k_proj", "post"], k_scale=1.9)
    return m, {"hidden_states": torch.randn(B, T, C), **inputs}, VALID


def funnel(rate: float) -> Case:
    names = ("r_w_bias", "r_r_bias", "r_s_bias")
    shapes = {**dict.fromkeys(names, (H, D)), "r_kernel": (C, H, D), "seg_embed": (2, H, D)}
    sizes = {"n_head": H, "scale": D**-0.5, "block_index": 0}
    dropouts = {"attention_dropout": nn.Dropout, "hidden_dropout": nn.Dropout}
    linear = ["q_head", "k_head", "v_head", "post_proj"]
    m = module(linear, shapes, rate, layer_norm=nn.LayerNorm(C), **sizes, **dropouts)
    m.config = type("Config", (), {"n_head": H})
    kinds = torch.randint(2, (B, T)).index_fill(1, torch.tensor(0), 2)  # 2: <cls>
    same = (kinds[:, :, None] == kinds[:, None]) | (kinds == 2)[:, :, None] | (kinds == 2)[:, None]
    cls_mask = nn.functional.pad(torch.ones(T - 1, T - 1), (1, 0, 1, 0))
    table = torch.randn(2 * T, C)
    attention_inputs = ([[table]], same, VALID.float(), cls_mask)
    return m, {"x": torch.randn(B, T, C), "attention_inputs": attention_inputs}, EVERYTHING


def enformer(rate: float) -> Case:
    shapes = {"rel_content_bias": (1, H, 1, D), "rel_pos_bias": (1, H, 1, D)}
    linear = ["to_q", "to_k", "to_rel_k"]
    dropouts = {"pos_dropout": nn.Dropout(0.0), "attn_dropout": nn.Dropout}
    m = module(linear, shapes, rate, heads=H, scale=D**-0.5, **dropouts)
    m.to_v, m.to_out = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
    return m, {"x": torch.randn(B, T, C), "positions": torch.randn(2 * T - 1, C)}, EVERYTHING


def rllib_gtrxl(rate: float) -> Case:
    shapes = {"_uvar": (H, D), "_vvar": (H, D)}
    parts = {"_rel_pos_embedding": Sines(), "_input_layernorm": nn.LayerNorm(C)}
    m = module(["_linear_layer", "_pos_proj"], shapes, _num_heads=H, **parts)
    m._qkv_layer = nn.Linear(C, 3 * C)
    return m, {"inputs": torch.randn(B, T, C), "memory": torch.randn(B, M, C)}, EVERYTHING


def torchrl_gtrxl(rate: float) -> Case:
    shapes = {"content_bias": (H, D), "position_bias": (H, D)}
    parts = {"norm1": nn.LayerNorm(C), "norm2": nn.LayerNorm(C), "dropout": nn.Dropout}
    parts |= {"attention_gate": Gate(), "mlp_gate": Gate(), "kv": nn.Linear(C, 2 * C)}
    m = module(["q", "relative", "out", "mlp"], shapes, rate, heads=H, **parts)
    m.positions = nn.Buffer(torch.randn(M + 1, C))
    is_init = torch.zeros(B, T, dtype=torch.bool)
    is_init[0, 4] = is_init[0, 6] = is_init[1, 0] = True
    valid = torch.arange(M) >= torch.tensor([[0], [3], [2]])
    inputs = {"current": torch.randn(B, T, C), "memory": torch.randn(B, M, C)}
    return m, {**inputs, "valid": valid, "is_init": is_init}, EVERYTHING


def wenet(rate: float) -> Case:
    mask = (VALID[:, None] & VALID[:, :, None]).long()  # padded queries see no key
    inputs = {"x": torch.randn(B, T, C), "mask": mask, "pos_emb": torch.randn(1, T, C)}
    return conformer(rate, h=H, d_k=D), inputs, EVERYTHING


CASES = {
    f.__name__: f
    for f in (
        fastspeech2_conformer,
        speechbrain,
        icefall_conformer,
        gemma3n_audio,
        gemma4_audio,
        funnel,
        enformer,
        rllib_gtrxl,
        torchrl_gtrxl,
        wenet,
    )
}
HELPERS = {"split", "join", "rate"}
WITHOUT_DROPOUT = {"gemma3n_audio", "gemma4_audio", "rllib_gtrxl"}


@pytest.mark.parametrize("name", CASES)
def test_a_function_computes_the_convention(mappings, name):
    torch.manual_seed(0)
    m, inputs, valid = CASES[name](0.3)
    ours, theirs = getattr(mappings.page, name), getattr(restatements, name)
    mappings.compare(ours, theirs, m.eval(), inputs, valid)


@pytest.mark.parametrize("name", sorted(CASES.keys() - WITHOUT_DROPOUT))
def test_dropout_in_training(mappings, name):
    """At almost 1 every probability is dropped."""
    torch.manual_seed(0)
    m, inputs, valid = CASES[name](1 - 1e-7)
    out = getattr(mappings.page, name)(m.train(), **inputs)[valid]
    torch.testing.assert_close(out, getattr(restatements, name)(m, **inputs)[valid])
    assert not torch.allclose(out, getattr(mappings.page, name)(m.eval(), **inputs)[valid])


def test_every_function_of_the_page_is_tested(mappings):
    functions = set(re.findall(r"^def (\w+)", "\n".join(mappings.blocks), flags=re.M))
    assert functions == {*CASES, *HELPERS, "inkling_decode"}
    table = mappings.text.split("## Errors")[1]
    assert all(f"`{name}`" in table for name in functions - HELPERS - {"inkling_decode"})


@pytest.mark.parametrize("R", [4, 9])
def test_decoding_from_a_paged_cache(mappings, R):
    """One query of each request at the end of its keys, which lie in pages in any order."""
    torch.manual_seed(0)
    n_page, size, Hk, d_rel = 12, 4, 2, 5
    cache = [torch.randn(n_page, size, Hk, D) for _ in range(2)]
    seq_lens = torch.tensor([14, 3, R, 8], dtype=torch.int32)  # also fewer than R keys
    pages = torch.randperm(n_page).int()
    block_table = torch.stack([pages[:4], pages[4:8], pages[8:12], pages[2:6]])
    q, rel = torch.randn(4, 2 * Hk, D), torch.randn(4, 2 * Hk, d_rel)
    proj = torch.randn(d_rel, R)
    expected, far_out, far_lse = [], [], []
    for b, n in enumerate(seq_lens.tolist()):
        k, v = (x[block_table[b].long()].flatten(0, 1)[:n].transpose(0, 1) for x in cache)
        k, v = (x.repeat_interleave(2, 0) for x in (k, v))  # [H, n, D]
        scores = torch.einsum("hd,hjd->hj", q[b], k) / D
        far = scores[:, : max(n - R, 0)]
        has_far = far.shape[1] > 0  # otherwise engines return any out and an infinite lse
        far_out.append((far.softmax(-1)[:, None] @ v[:, : far.shape[1]])[:, 0])
        far_out[-1] = far_out[-1] if has_far else torch.full((2 * Hk, D), math.nan)
        far_lse.append(far.logsumexp(-1) if has_far else torch.full((2 * Hk,), math.inf))
        distance = n - 1 - torch.arange(n)
        bias = (rel[b] @ proj)[:, distance.clamp(max=R - 1)] * (distance < R)
        expected.append(((scores + bias).softmax(-1)[:, None] @ v)[:, 0])
    far = (torch.stack(far_out), torch.stack(far_lse, 1))
    out = mappings.page.inkling_decode(q, rel, proj, cache, block_table, seq_lens, far)
    torch.testing.assert_close(out, torch.stack(expected))
