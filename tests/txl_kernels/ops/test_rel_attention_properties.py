"""rel_attention over shapes, strides, masks, offsets and dtypes that nobody thought of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from txl_kernels.testing import RelAttentionCase, check_rel_attention

SIZES = st.integers(1, 40)


@st.composite
def cases(draw):
    B, Hk, Tq, Ts = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(SIZES), draw(SIZES)
    H = Hk * draw(st.integers(1, 3))
    Tm = draw(st.one_of(st.just(0), SIZES))
    Tk = Tm + Ts
    near = st.integers(-3, Tk + 3)
    per_row = st.lists(near, min_size=B, max_size=B)
    # A list for each query, from a few draws: the ranges are in no order.
    per_query = st.lists(near, min_size=3, max_size=7).map(
        lambda drawn: [[drawn[(b + i * i) % len(drawn)] for i in range(Tq)] for b in range(B)]
    )
    length = st.one_of(st.none(), per_row, per_query)
    anywhere = st.one_of(st.integers(-60, 100), st.sampled_from([2**31 + 5, -(2**63)]))
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        side = st.one_of(st.none(), st.integers(0, 30))
        options["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        chunk = st.tuples(st.integers(1, 20), st.integers(0, 3), st.integers(-40, 40))
        options["chunk"] = draw(chunk)
    if draw(st.booleans()):
        options["offset"] = draw(st.integers(-50, 80))
        options["clamp"] = draw(st.booleans())
    factor = st.sampled_from([None, 0.0, -0.4, 0.3])
    options |= {"scale": draw(factor), "pos_scale": draw(factor)}
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    if draw(st.booleans()):
        options["dropout_p"] = draw(st.sampled_from([0.1, 0.5]))
    return RelAttentionCase(
        "drawn",
        B=B,
        H=H,
        Hk=Hk,
        Tq=Tq,
        Ts=Ts,
        Tm=Tm,
        D=draw(st.integers(1, 70)),
        Dv=draw(st.one_of(st.none(), st.integers(1, 70))),
        Dp=draw(st.one_of(st.none(), st.integers(1, 70))),
        R=draw(st.one_of(st.none(), st.integers(1, 90))),
        r_batch=draw(st.booleans()),
        r_heads=draw(st.booleans()),
        biases=draw(st.booleans()),
        transposed=draw(st.booleans()),
        mask=draw(st.sampled_from([None, (B, H, Tq, Tk), (B, 1, 1, Tk), (Tq, Tk), (Tq, 1)])),
        q_start=draw(st.one_of(st.none(), st.lists(anywhere, min_size=B, max_size=B))),
        key_start=draw(length),
        key_lens=draw(length),
        lse_gradient=draw(st.booleans()),
        # Backward's exp(score - lse) inherits the rounding of lse, which is float32 by contract and
        # which the budget does not count: scores of a few units, not tens, at any head size.
        spread=0.5,
        seed=draw(st.integers(0, 1000)),
        options=options,
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_within_the_error_budget(backend, case, dtype, require_backend):
    require_backend("rel_attention", backend, dtype=dtype, D=case.D, needs_grad=True)
    check_rel_attention(case, backend, dtype)
