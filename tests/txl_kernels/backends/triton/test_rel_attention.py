"""The Triton kernels of rel_attention in Triton's interpreter: parity, poisoned memory, bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from txl_kernels import rel_attention, rel_attention_with_lse, warmup
from txl_kernels.backends.triton import launch_table
from txl_kernels.testing import REL_ATTENTION_CASES, RelAttentionCase, check_rel_attention

pytestmark = pytest.mark.interpreted

LACKS = {"bias", "dead_rows='uniform'"}
SERVED = [case for case in REL_ATTENTION_CASES if not LACKS & {*case.uses}]
BY_NAME = {case.name: case for case in SERVED}
IN_FLOAT16 = ("transformer_xl", "head_41", "clamp", "everything")
LARGE_TILES = ("long", "long_memory", "conformer", "transformer_xl")  # small ones need minutes
WILD = [-(2**63), 3, 2**40]


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)


@pytest.fixture
def poisoned(poison):
    """Every new tensor holds NaN, so that an element that no kernel writes is found."""
    with poison():
        yield


@pytest.fixture
def tile(monkeypatch):
    """Sets the tile that interpreted kernels work on."""

    def set_tile(block_q: int, block_k: int) -> None:
        for key, config in launch_table.rows().items():
            if key.launch_class == "interpreter" and key.kernel.startswith("rel_attention"):
                interpreted = config._replace(BLOCK_Q=block_q, BLOCK_K=block_k)
                monkeypatch.setitem(launch_table.rows(), key, interpreted)

    return set_tile


@pytest.mark.parametrize("case", SERVED, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_output_and_gradients_are_within_the_error_budget(case, tile):
    if case.name in LARGE_TILES:
        tile(32, 64)
    check_rel_attention(case, "triton", torch.float32)


@pytest.mark.parametrize("name", IN_FLOAT16)
@pytest.mark.usefixtures("poisoned")
def test_float16_is_within_the_error_budget(name):
    check_rel_attention(BY_NAME[name], "triton", torch.float16)


@pytest.mark.parametrize("blocks", [(16, 64), (32, 32), (64, 128)], ids=str)
def test_tiles_that_are_shipped(blocks, tile):
    tile(*blocks)
    check_rel_attention(BY_NAME["everything"], "triton", torch.float32)


def _guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values between ranges of NaN, so that any read outside gives NaN."""
    room = torch.full((tensor.numel() + 4096,), torch.nan, dtype=tensor.dtype)
    inner = room[2048:-2048].view(tensor.shape)
    inner.copy_(tensor)
    return inner


@pytest.mark.parametrize("start", WILD)
@pytest.mark.parametrize("length", WILD)
def test_wild_lengths_read_nothing_outside(start, length):
    case = RelAttentionCase("guarded", B=2, H=1, Tq=9, Tm=6, D=20, options={"causal": True})
    floats, _ = case.inputs(torch.float32)
    guarded = {name: _guarded(tensor.detach()).requires_grad_() for name, tensor in floats.items()}
    lengths = {
        "key_start": torch.tensor([start, 0]),
        "key_lens": torch.tensor([length, 15]),
    }
    out = rel_attention(**guarded, **lengths, causal=True, backend="triton")
    expected = rel_attention(**floats, **lengths, causal=True, backend="reference")
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), list(guarded.values()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("wild", WILD)
def test_wild_positions_read_nothing_outside(wild):
    case = RelAttentionCase("guarded", B=2, H=2, Hk=1, Tq=18, Tm=6, D=20, Dp=5, R=9)
    floats, _ = case.inputs(torch.float32)
    guarded = {name: _guarded(tensor.detach()).requires_grad_() for name, tensor in floats.items()}
    others = {
        "q_start": torch.tensor([wild, 30]),
        "key_start": torch.tensor([3, -1 - wild, wild] * 12).view(2, 18),
        "key_lens": torch.tensor([wild, 15, 20, 7] * 9).view(2, 18),
    }
    options = {"window": (9, 4), "offset": 6, "pos_scale": -0.3}
    out = rel_attention(**guarded, **others, **options, backend="triton")
    expected = rel_attention(**floats, **others, **options, backend="reference")
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), list(guarded.values()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    "chunk",
    [(1, 0), (2**62, 0), (2**62, 3, 5), (2**50, 0, 2**50 - 4), (7, 2**60, -(2**60))],
    ids=str,
)
def test_chunks_of_any_size(chunk):
    case = RelAttentionCase("chunk", B=1, H=1, Tq=19, Tm=3, options={"chunk": chunk})
    check_rel_attention(case, "triton", torch.float32)


@pytest.mark.parametrize(
    ("scale", "pos_scale"), [(0.0, None), (-0.4, None), (0.0, -0.5), (0.02, 0.7), (-0.4, 0.0)]
)
def test_factors_of_any_sign(scale, pos_scale):
    options = {"causal": True, "scale": scale, "pos_scale": pos_scale}
    case = replace(BY_NAME["scale"], B=1, H=2, options=options)
    check_rel_attention(case, "triton", torch.float32)


@pytest.mark.parametrize("sizes", [{"Tq": 0}, {"Ts": 0}, {"B": 0}], ids=str)
def test_nothing_to_attend(sizes):
    B, H, Tq, Ts, D = (
        sizes.get(name, n) for name, n in (("B", 2), ("H", 3), ("Tq", 4), ("Ts", 5), ("D", 6))
    )
    q, k, v, r = (
        torch.randn(shape, requires_grad=True)
        for shape in ((B, H, Tq, D), (B, H, Ts, D), (B, H, Ts, D), (1, H, 7, D))
    )
    out, lse = rel_attention_with_lse(q, k, v, r, backend="triton")
    assert torch.equal(out, torch.zeros(B, H, Tq, D))
    assert torch.equal(lse, torch.full((B, H, Tq), -torch.inf))
    for grad in torch.autograd.grad(out.sum(), (q, k, v, r)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_warmup_runs_each_shape_forward_and_backward():
    shape = {"B": 1, "H": 2, "Tq": 3, "Tm": 2, "D": 4, "dtype": torch.float32, "causal": True}
    shape["backend"] = "triton"
    warmup(
        [shape, {**shape, "mask": True, "key_start": True, "gradients": False}],
        device="cpu",
    )
    with pytest.raises(TypeError, match="'D'"):
        warmup([{"B": 1, "H": 2, "Tq": 3}], device="cpu")


SIZES = st.integers(1, 40)
FACTORS = st.sampled_from([None, None, 0.0, 0.3, -0.3, 1.0])


def per_row(B, element):
    return st.lists(element, min_size=B, max_size=B)


@st.composite
def cases(draw):
    B, Hk, Tq, Ts = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(SIZES), draw(SIZES)
    H = Hk * draw(st.integers(1, 3))
    Tm = draw(st.one_of(st.just(0), SIZES))
    Tk = Tm + Ts
    key = st.integers(-3, Tk + 3)
    ranges = st.lists(key, min_size=Tq, max_size=Tq)
    length = st.one_of(st.none(), per_row(B, key), per_row(B, ranges))
    q_start = st.one_of(st.none(), per_row(B, st.integers(-Tq - 9, Tk + 9)))
    options = {"causal": draw(st.booleans())}
    options |= {"scale": draw(FACTORS), "pos_scale": draw(FACTORS)}
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
        Hk=Hk,
        Tq=Tq,
        Ts=Ts,
        Tm=Tm,
        D=draw(st.integers(1, 40)),
        Dv=draw(st.one_of(st.none(), st.integers(1, 40))),
        Dp=draw(st.one_of(st.none(), st.integers(1, 40))),
        R=draw(st.one_of(st.none(), st.integers(1, 90))),
        r_batch=draw(st.booleans()),
        r_heads=draw(st.booleans()),
        biases=draw(st.booleans()),
        transposed=draw(st.booleans()),
        mask=draw(st.sampled_from([None, (B, H, Tq, Tk), (B, 1, 1, Tk), (Tq, Tk)])),
        q_start=draw(q_start),
        key_start=draw(length),
        key_lens=draw(length),
        lse_gradient=draw(st.booleans()),
        spread=0.5,
        seed=draw(st.integers(0, 1000)),
        options=options,
    )


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_drawn_cases_are_within_the_error_budget(case, dtype):
    check_rel_attention(case, "triton", dtype)
