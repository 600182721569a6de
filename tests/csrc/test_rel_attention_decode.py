"""The native kernels for few queries on the CPU: many blocks of keys, threads, absent keys."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_attention_with_lse
from txl_kernels.backends import native
from txl_kernels.testing import RelAttentionCase, check_rel_attention_output
from txl_kernels.testing.rel_attention_cases import unordered_ranges

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)

CAUSAL = {"causal": True}
# Blocks have at most a few hundred keys, so that each of these calls merges several.
LONG_CASES = (
    RelAttentionCase("one_query", Tq=1, Tm=1100, D=64, options=CAUSAL),
    RelAttentionCase("most_queries", Tq=16, Tm=500, D=32, options=CAUSAL),  # in float32
    RelAttentionCase("two_tensors", Tq=6, Tm=701, Ts=300, D=41, transposed=True),
    RelAttentionCase("odd_heads", Tq=3, Tm=600, D=17, Dv=70, Dp=31, options=CAUSAL),
    RelAttentionCase("ranges", H=4, Hk=2, Tq=7, Tm=600, D=24, **unordered_ranges(2, 7, 607)),
    RelAttentionCase(
        "cache",
        B=4,
        H=4,
        Hk=1,
        Tq=4,
        Tm=0,
        Ts=900,
        D=24,
        q_start=[700, 0, 896, 300],
        key_start=[100, 0, 300, 301],
        key_lens=[704, 4, 900, 300],
        options=CAUSAL,
    ),
    RelAttentionCase(
        "clamp",
        Tq=8,
        Tm=800,
        D=20,
        Dp=33,
        R=40,
        r_heads=False,
        options={"offset": -770, "clamp": True, "softcap": 4.0},
    ),
    RelAttentionCase(
        "mask",
        Tq=5,
        Tm=520,
        D=36,
        R=200,
        mask=(2, 1, 5, 525),
        options={"offset": -330, "window": (400, None)},
    ),
)
DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def attend(**call):
    return rel_attention_with_lse(**call, backend="native")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_many_blocks_are_within_the_error_budget(case, dtype):
    check_rel_attention_output(case, dtype, attend)


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_a_call_with_gradients_has_the_same_results(case):
    floats, others = case.inputs(torch.float32)
    with_gradients = attend(**floats, **others, **case.options)
    detached = {name: x.detach() for name, x in floats.items()}
    without = attend(**detached, **others, **case.options)
    for actual, expected in zip(without, with_gradients, strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-5)


def with_threads(threads, call):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return attend(**call)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(case, dtype):
    floats, others = case.inputs(dtype)
    call = {name: x.detach() for name, x in floats.items()} | others | case.options
    alone = with_threads(1, call)
    for threads in (2, 3, 7):
        assert all(map(torch.equal, alone, with_threads(threads, call)))


@pytest.mark.parametrize("D", [16, 41, 64])
def test_keys_that_no_query_may_use_can_hold_anything(D):
    case = RelAttentionCase("cache", Tq=2, Tm=0, Ts=700, D=D, R=30, options={"offset": 2})
    floats, _ = case.inputs(torch.float32)
    call = {name: x.detach() for name, x in floats.items()}
    call |= {"key_start": torch.tensor([17, 300]), "key_lens": torch.tensor([530, 303])}
    finite = attend(**call)
    for b, (begin, end) in enumerate(((17, 530), (300, 303))):
        for name in ("k", "v"):
            call[name][b, :, :begin] = torch.nan
            call[name][b, :, end:] = torch.inf
    assert all(map(torch.equal, finite, attend(**call)))
