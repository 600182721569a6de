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
    B, H, Tq, Ts = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(SIZES), draw(SIZES)
    Tm = draw(st.one_of(st.just(0), SIZES))
    Tk = Tm + Ts
    length = st.lists(st.integers(-3, Tk + 3), min_size=B, max_size=B)
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
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    if draw(st.booleans()):
        options["dropout_p"] = draw(st.sampled_from([0.1, 0.5]))
    return RelAttentionCase(
        "drawn",
        B=B,
        H=H,
        Tq=Tq,
        Ts=Ts,
        Tm=Tm,
        D=draw(st.integers(1, 70)),
        Dv=draw(st.one_of(st.none(), st.integers(1, 70))),
        R=draw(st.one_of(st.none(), st.integers(1, 90))),
        r_batch=draw(st.booleans()),
        r_heads=draw(st.booleans()),
        biases=draw(st.booleans()),
        transposed=draw(st.booleans()),
        mask=draw(st.sampled_from([None, (B, H, Tq, Tk), (B, 1, 1, Tk), (Tq, Tk), (Tq, 1)])),
        key_start=draw(st.one_of(st.none(), length)),
        key_lens=draw(st.one_of(st.none(), length)),
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
