"""The reference of rel_attention against the formula as four loops in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from txl_kernels import rel_attention, rel_attention_with_lse
from txl_kernels.testing import REL_ATTENTION_CASES, RelAttentionCase, dropout_keep

SMALL = {"B": 2, "H": 2, "Tq": 5, "Tm": 3, "D": 3}
CLAMPED = {"offset": 2, "clamp": True}
UNORDERED_STARTS = [[3, 0, 7, -2, 1], [0, 8, 2, 2, -(2**50)]]
UNORDERED_ENDS = [[8, 2, 5, 2**40, 4], [6, 9, 3, -7, 8]]
LOOP_CASES = [
    RelAttentionCase("plain", **SMALL),
    RelAttentionCase("no_biases", **SMALL, biases=False),
    RelAttentionCase("q_pos", **SMALL, Dp=2),
    RelAttentionCase("values", **SMALL, Dv=4, r_batch=True, r_heads=False),
    RelAttentionCase("fewer_keys", B=1, H=2, Tq=5, Tm=0, Ts=3, D=3, options={"causal": True}),
    RelAttentionCase("offset", **SMALL, R=4, options={"offset": 2}),
    RelAttentionCase("clamp", **SMALL, R=4, options={"offset": 2, "clamp": True}),
    RelAttentionCase("causal", **SMALL, options={"causal": True}),
    RelAttentionCase("window", **SMALL, options={"window": (2, 1)}),
    RelAttentionCase("window_left", **SMALL, options={"window": (1, None)}),
    RelAttentionCase("window_right", **SMALL, options={"window": (None, 0)}),
    RelAttentionCase("chunk", **SMALL, options={"chunk": (2, 1)}),
    RelAttentionCase("chunk_phase", **SMALL, options={"chunk": (3, 0, 2)}),
    RelAttentionCase("chunk_negative_phase", **SMALL, options={"chunk": (3, 1, -4)}),
    RelAttentionCase("lengths", **SMALL, key_start=[1, -3], key_lens=[7, 2**40]),
    RelAttentionCase("dead", **SMALL, key_start=[6, 0], key_lens=[8, 0], options={"causal": True}),
    RelAttentionCase("uniform", **SMALL, key_start=[6, 8], options={"dead_rows": "uniform"}),
    RelAttentionCase("mask", **SMALL, mask=(2, 1, 5, 8)),
    RelAttentionCase("mask_1d", **SMALL, mask=(8,)),
    RelAttentionCase("bias", **SMALL, bias=(2, 5, 8)),
    RelAttentionCase("softcap", **SMALL, bias=(8,), options={"softcap": 1.5}),
    RelAttentionCase("scale", **SMALL, options={"scale": -0.7}),
    RelAttentionCase("dropout", **SMALL, options={"dropout_p": 0.3}),
    RelAttentionCase("groups", **{**SMALL, "H": 4}, Hk=2, options={"causal": True}),
    RelAttentionCase("pos_scale", **SMALL, options={"pos_scale": 0.9, "scale": 0.0}),
    RelAttentionCase("pos_scale_zero", **SMALL, options={"pos_scale": 0.0}),
    RelAttentionCase("q_pos_scale", **SMALL, Dp=4, R=4, options={"pos_scale": -1.3, "offset": 2}),
    RelAttentionCase("q_start", **SMALL, q_start=[1, -2], options={"causal": True}),
    RelAttentionCase("q_start_window", **SMALL, q_start=[3, 9], options={"window": (3, 1)}),
    RelAttentionCase("q_start_clamp", **SMALL, R=4, q_start=[5, -9], options=CLAMPED),
    RelAttentionCase("q_start_chunk", **SMALL, q_start=[-5, 4], options={"chunk": (3, 1, 1)}),
    RelAttentionCase("q_start_far", **SMALL, q_start=[2**40, -(2**63)], options=CLAMPED),
    RelAttentionCase("ranges", **SMALL, key_start=UNORDERED_STARTS, key_lens=UNORDERED_ENDS),
    RelAttentionCase("ranges_mixed", **SMALL, key_start=[2, 0], key_lens=UNORDERED_ENDS),
    RelAttentionCase("ranges_mixed_2", **SMALL, key_start=UNORDERED_STARTS, key_lens=[7, 5]),
    RelAttentionCase(
        "everything",
        **SMALL,
        Hk=1,
        Dp=2,
        R=3,
        bias=(5, 8),
        mask=(5, 8),
        q_start=[4, 2],
        key_start=[1, 2],
        key_lens=[[8, 8, 6, 6, 8], [7, 8, 5, 8, 8]],
        options={
            "pos_scale": 0.8,
            "causal": True,
            "window": (4, None),
            "chunk": (3, 1, 1),
            "offset": 1,
            "clamp": True,
            "softcap": 2.0,
            "dropout_p": 0.2,
        },
    ),
]


@pytest.mark.parametrize("case", LOOP_CASES, ids=lambda case: case.name)
def test_reference_equals_four_loops(case):
    floats, others = case.inputs(torch.float64)
    out, lse = rel_attention_with_lse(**floats, **others, **case.options, backend="reference")
    due_out, due_lse = _four_loops({**floats, **others, **case.options})
    torch.testing.assert_close(out.detach(), due_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse.detach(), due_lse, rtol=1e-12, atol=1e-12)


def _four_loops(call):
    """The contract's formula, one number at a time."""
    call = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    values = call["v"]
    if "mem_k" in call:
        call["k"] = torch.cat([call["mem_k"], call["k"]], 2)
        values = torch.cat([call["mem_v"], values], 2)
    B, H, Tq, _ = call["q"].shape
    group = H // values.shape[1]
    Tk = values.shape[2]
    p_drop = call.get("dropout_p", 0.0)
    keep = torch.ones(B, H, Tq, Tk, dtype=torch.bool)
    if p_drop:
        keep = dropout_keep(call["dropout_seed"], p_drop, (B, H, Tq, Tk))
    out = values.new_zeros(B, H, Tq, values.shape[3])
    lse = values.new_full((B, H, Tq), -torch.inf)
    for b, h, i in itertools.product(range(B), range(H), range(Tq)):
        seen = [j for j in range(Tk) if _sees(call, b, h, i, j, Tq, Tk)]
        weights = {j: math.exp(_score(call, b, h, i, j)) for j in seen}
        if weights:
            lse[b, h, i] = math.log(sum(weights.values()))
        elif call.get("dead_rows") == "uniform":
            weights = dict.fromkeys(range(Tk), 1.0)
        total = sum(weights.values())
        for j, weight in weights.items():
            if keep[b, h, i, j]:
                out[b, h, i] += weight / total / (1 - p_drop) * values[b, h // group, j]
    return out, lse


def _score(call, b, h, i, j):
    B, H, Tq, D = call["q"].shape
    q, q_pos = call["q"][b, h, i], call.get("q_pos", call["q"])[b, h, i]
    if "r_w_bias" in call:
        q, q_pos = q + call["r_w_bias"][h], q_pos + call["r_r_bias"][h]
    Hk, Tk = call["k"].shape[1:3]
    scale = call.get("scale", 1 / math.sqrt(D))
    score = scale * float(q @ call["k"][b, h // (H // Hk), j])
    r = call["r"].expand(B, H, -1, -1)[b, h]
    m = j - _position(call, b, i, Tk) + Tk - Tq + call.get("offset", Tq - 1)
    if call.get("clamp"):
        m = min(max(m, 0), len(r) - 1)
    if 0 <= m < len(r):
        score += call.get("pos_scale", scale) * float(q_pos @ r[m])
    if "bias" in call:
        score += float(call["bias"].expand(B, H, Tq, -1)[b, h, i, j])
    if "softcap" in call:
        score = call["softcap"] * math.tanh(score / call["softcap"])
    return score


def _position(call, b, i, Tk):
    if "q_start" not in call:
        return i + Tk - call["q"].shape[2]
    return i + min(max(int(call["q_start"][b]), -(2**31)), 2**31)


def _sees(call, b, h, i, j, Tq, Tk):
    B = call["q"].shape[0]
    p = _position(call, b, i, Tk)
    left, right = call.get("window", (None, None))
    conditions = [
        not call.get("causal") or j <= p,
        left is None or j >= p - left,
        right is None or j <= p + right,
    ]
    if "chunk" in call:
        size, back, phase = (*call["chunk"], 0)[:3]
        conditions.append(0 <= (p + phase) // size - (j + phase) // size <= back)
    if "key_start" in call:
        conditions.append(j >= int(call["key_start"].view(B, -1).expand(B, Tq)[b, i]))
    if "key_lens" in call:
        conditions.append(j < int(call["key_lens"].view(B, -1).expand(B, Tq)[b, i]))
    if "mask" in call:
        mask = call["mask"].expand(*call["q"].shape[:3], Tk)
        conditions.append(bool(mask[b, h, i, j]))
    return all(conditions)


@pytest.mark.parametrize(
    "case", [case for case in LOOP_CASES if "dead_rows" not in case.options], ids=lambda c: c.name
)
def test_reference_gradients_equal_finite_differences(case):
    floats, others = case.inputs(torch.float64)
    names = list(floats)

    def call(*tensors):
        inputs = dict(zip(names, tensors, strict=True))
        out, lse = rel_attention_with_lse(**inputs, **others, **case.options, backend="reference")
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(call, tuple(floats.values()), fast_mode=True)


def test_reference_has_a_second_derivative():
    floats, _ = LOOP_CASES[0].inputs(torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda q, k: rel_attention(**{**floats, "q": q, "k": k}, backend="reference"),
        (floats["q"], floats["k"]),
        fast_mode=True,
    )


def test_nothing_is_nan_where_no_key_is_seen():
    case = next(case for case in REL_ATTENTION_CASES if case.name == "dead_rows")
    floats, others = case.inputs(torch.float32)
    out = rel_attention(**floats, **others, **case.options, backend="reference")
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in floats.values())
    assert not out[1].any()
    assert not floats["q"].grad[1].any()
