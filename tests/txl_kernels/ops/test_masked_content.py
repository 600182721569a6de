"""Keys and values outside `key_start <= j < key_lens` may hold anything: nothing reads them."""

from __future__ import annotations

import math
from itertools import cycle

import pytest
import torch

from txl_kernels import rel_attention, rel_attention_with_lse
from txl_kernels.testing import RelAttentionCase as Case

CAUSAL = {"causal": True}
POSITIONS = {"pos_scale": -0.3, "causal": True}
RANGE = {"key_start": [3, 9], "key_lens": [22, 14]}
EVERYTHING = {
    "causal": True,
    "window": (15, None),
    "chunk": (6, 2, 1),
    "softcap": 4.0,
    "scale": 0.2,
    "dropout_p": 0.2,
}
CASES = (
    Case("both_ends", **RANGE),
    Case("start", key_start=[3, 9], options=CAUSAL),
    Case("end", key_lens=[22, 3]),
    Case("no_memory", Tm=0, key_start=[2, 0], key_lens=[17, 11], options=CAUSAL),
    Case("one_query", Tq=1, Tm=30, key_start=[7, 30], key_lens=[31, 31]),
    Case("across_tiles", H=1, Tq=35, Tm=70, key_start=[37, 85], key_lens=[101, 90]),
    Case("no_key", B=4, key_start=[40, 5, 9, -2], key_lens=[50, 5, 2, -3], options=CAUSAL),
    Case("wild", B=4, key_start=[-5, 2**40, 0, 3], key_lens=[2**50, 5, -(2**40), 9]),
    Case("no_biases", biases=False, transposed=True, D=41, **RANGE, options=CAUSAL),
    Case("values_wider", D=4, Dv=19, r_heads=False, **RANGE),
    Case("softcap", **RANGE, options={"softcap": 3.0}),
    Case("dropout", **RANGE, options={"dropout_p": 0.3, **CAUSAL}),
    Case("mask", **RANGE, mask=(2, 3, 17, 22)),
    Case("chunk", **RANGE, options={"chunk": (4, 1, 2)}),
    Case("window", **RANGE, options={"window": (6, 2)}),
    Case("clamp", **RANGE, R=5, r_batch=True, options={"offset": 2, "clamp": True}),
    Case("negative_scale", **RANGE, options={"scale": -0.4, **CAUSAL}),
    Case("grouped_q_pos", H=4, Hk=2, Dp=5, q_start=[20, 4], **RANGE, options=POSITIONS),
    Case("q_start", q_start=[-4, 40], **RANGE, lse_gradient=True),
    Case("ranges_mixed", key_start=[3, 9], key_lens=[[*range(20, 3, -1)], [22, 3] * 8 + [0]]),
    Case("everything", Tm=9, R=9, mask=(2, 1, 17, 26), **RANGE, options=EVERYTHING),
)
ONLY_REFERENCE = (
    Case("bias", bias=(3, 17, 22), **RANGE),
    Case("bias_softcap", bias=(17, 22), **RANGE, options={"softcap": 3.0}),
)
ONE_HEAD = {"B": 1, "H": 1, "D": 4}
SMALL = (  # for Triton's interpreter
    Case("memory", **ONE_HEAD, Tq=5, Tm=19, key_start=[3], key_lens=[22], options={"softcap": 3.0}),
    Case("segment", **ONE_HEAD, Tq=20, Tm=2, key_start=[7], key_lens=[21], options=CAUSAL),
    Case("grouped", B=1, H=2, Hk=1, Dp=3, D=4, Tq=5, key_start=[3], q_start=[6], options=POSITIONS),
    Case("no_key", H=1, D=4, Tq=3, Tm=17, key_start=[9, 4], key_lens=[3, 19], mask=(3, 20)),
    Case(
        "everything", H=1, Tq=7, Tm=9, R=9, key_start=[3, 9], key_lens=[15, 14], options=EVERYTHING
    ),
)
FILLS = {"nan": math.nan, "inf": math.inf, "negative_inf": -math.inf, "largest": 3e38}
BACKENDS = ["reference", "native"]


def masked_keys(case: Case) -> torch.Tensor:
    """bool [B, Tk]: the keys that `key_start` and `key_lens` mask out for all queries alike."""
    j = torch.arange(case.Tm + (case.Ts or case.Tq))
    start = torch.tensor(case.key_start or [0] * case.B)
    end = torch.tensor(case.key_lens or [len(j)] * case.B)
    if end.ndim == 2:
        end = torch.full((case.B,), len(j))
    return (j < start[:, None]) | (j >= end[:, None])


def filled(case: Case, floats: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    """The same tensors with `value` in every masked key and value."""
    hidden = masked_keys(case)
    parts = {"k": hidden[:, case.Tm :], "mem_k": hidden[:, : case.Tm]}
    parts |= {"v": parts["k"], "mem_v": parts["mem_k"]}
    return {
        name: x.masked_fill(parts[name][:, None, :, None], value) if name in parts else x
        for name, x in floats.items()
    }


def results(case: Case, backend: str, dtype: torch.dtype, value: float) -> dict[str, torch.Tensor]:
    """out, lse and all gradients, with `value` in every masked key and value."""
    floats, others = case.inputs(dtype)
    floats = filled(case, {name: x.detach() for name, x in floats.items()}, value)
    leaves = {name: x.requires_grad_() for name, x in floats.items()}
    out, lse = rel_attention_with_lse(**leaves, **others, **case.options, backend=backend)
    douts = (case.dout(dtype), case.dlse(dtype) if case.lse_gradient else torch.zeros_like(lse))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), douts)
    return {"out": out, "lse": lse, **dict(zip(leaves, grads, strict=True))}


def check(case: Case, backend: str, dtype: torch.dtype, value: float) -> None:
    due = results(case, backend, dtype, 0.0)
    actual = results(case, backend, dtype, value)
    for name, x in actual.items():
        assert torch.equal(x, due[name]), name
        assert name == "lse" or x.isfinite().all(), name
    for name in ("k", "v", "mem_k", "mem_v"):
        if name in actual:
            hidden = masked_keys(case)
            hidden = hidden[:, : case.Tm] if name.startswith("mem") else hidden[:, case.Tm :]
            assert not actual[name].transpose(1, 2)[hidden].any(), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_masked_keys_changes_nothing(backend, case, require_backend):
    require_backend("rel_attention", backend, needs_grad=True)
    check(case, backend, torch.float32, math.nan)


@pytest.mark.parametrize("case", ONLY_REFERENCE, ids=str)
def test_nan_changes_nothing_beside_arguments_of_the_reference_alone(case):
    check(case, "reference", torch.float32, math.nan)


@pytest.mark.interpreted
@pytest.mark.parametrize(("case", "value"), [*zip(SMALL, cycle(FILLS.values()))], ids=str)
def test_triton_reads_no_masked_key(case, value, require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)
    check(case, "triton", torch.float32, value)


@pytest.mark.parametrize("value", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_value_changes_anything(backend, value, require_backend):
    require_backend("rel_attention", backend, needs_grad=True)
    for name in ("both_ends", "softcap"):
        check(next(case for case in CASES if case.name == name), backend, torch.float32, value)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["fp64", "bf16", "fp16"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype(backend, dtype, require_backend):
    require_backend("rel_attention", backend, dtype=dtype, needs_grad=True)
    for case in (CASES[0], CASES[-1]):
        check(case, backend, dtype, math.nan)


def test_the_reference_keeps_a_second_derivative():
    case = Case("small", B=2, H=1, Tq=3, Tm=2, D=2, key_start=[1, 4], key_lens=[5, 2])
    floats, others = case.inputs(torch.float64)
    fixed = filled(case, {name: x.detach() for name, x in floats.items()}, math.nan)

    def call(q, r):
        return rel_attention(**{**fixed, "q": q, "r": r}, **others, backend="reference")

    assert torch.autograd.gradgradcheck(call, (floats["q"], floats["r"]), fast_mode=True)
