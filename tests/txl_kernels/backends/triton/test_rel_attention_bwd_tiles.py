"""Which tiles the Triton backward of rel_attention computes, and which gradients it ignores."""

from __future__ import annotations

import importlib

import pytest
import torch

from txl_kernels import rel_attention_with_lse
from txl_kernels.backends import triton as package
from txl_kernels.testing import RelAttentionCase, check_rel_attention

pytestmark = pytest.mark.interpreted

TILE = 16  # queries and keys of a tile in the interpreter
WILD = [-(2**62), 20, 2**40]
NOT_MONOTONE = [[(7 * i + b) % 23 for i in range(20)] for b in range(2)]
CASES = [
    RelAttentionCase(
        "position_query",
        B=1,
        H=2,
        Hk=1,
        Tq=20,
        D=3,
        Dv=9,
        Dp=20,
        R=6,
        lse_gradient=True,
        options={"causal": True, "offset": 4, "scale": 0.6, "pos_scale": -0.3, "softcap": 4.0},
    ),
    RelAttentionCase(
        "first_positions",
        B=3,
        H=1,
        Tq=20,
        Tm=20,
        R=9,
        q_start=WILD,
        lse_gradient=True,
        options={"window": (11, 2), "chunk": (30, 1, 7), "pos_scale": 0.0},
    ),
    RelAttentionCase(
        "ranges",
        B=2,
        H=2,
        Hk=1,
        Tq=20,
        Tm=5,
        Dp=4,
        R=9,
        q_start=[3, -2],
        key_start=NOT_MONOTONE,
        key_lens=[24, 21],
        mask=(2, 1, 20, 25),
        lse_gradient=True,
        options={"scale": 0.0, "pos_scale": 0.7, "dropout_p": 0.2},
    ),
]


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)


@pytest.fixture
def n_calls(monkeypatch):
    """A function that counts the calls of a kernel's function from then on."""

    def count(kernel: str, function: str) -> list[int]:
        module = importlib.import_module(f"{package.__name__}.rel_attention_bwd_{kernel}")
        called = getattr(module, function)
        n = [0]

        def counted(*args):
            n[0] += 1
            return called(*args)

        monkeypatch.setattr(module, function, counted)
        return n

    return count


def gradients(case: RelAttentionCase, *, dlse: float | None = None) -> list[torch.Tensor]:
    """Gradients of all inputs; each element of lse has the gradient dlse."""
    floats, others = case.inputs(torch.float32)
    out, lse = rel_attention_with_lse(**floats, **others, **case.options, backend="triton")
    results, dresults = [out], [case.dout(torch.float32)]
    if dlse is not None:
        results.append(lse)
        dresults.append(torch.full_like(lse, dlse))
    return list(torch.autograd.grad(results, list(floats.values()), dresults))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_within_the_error_budget(case, poison):
    check_rel_attention(case, "triton", torch.float32, within=poison)


def test_gradient_of_lse_is_ignored_in_rows_without_keys():
    # The first batch row's queries are before all keys; the last four of the second have none.
    case = RelAttentionCase(
        "dead",
        B=2,
        H=1,
        Tm=0,
        q_start=[-17, 0],
        key_lens=[[17] * 17, [17] * 13 + [0] * 4],
        options={"causal": True},
    )
    floats, others = case.inputs(torch.float32)
    out, lse = rel_attention_with_lse(**floats, **others, **case.options, backend="triton")
    dead = lse == -torch.inf
    assert dead[0].all()
    assert dead[1].sum() == 4
    dlse = torch.randn(lse.shape).masked_fill(dead, torch.nan)
    dout = case.dout(torch.float32)
    actual = torch.autograd.grad([out, lse], list(floats.values()), [dout, dlse])
    out, lse = rel_attention_with_lse(**floats, **others, **case.options, backend="triton")
    due = torch.autograd.grad([out, lse], list(floats.values()), [dout, dlse.nan_to_num(5.0)])
    for name, grad, expected in zip(floats, actual, due, strict=True):
        assert torch.equal(grad, expected), name
    assert not actual[0][0].any()  # dq
    assert actual[0][1].any()


@pytest.mark.parametrize("kernel", ["dkdv", "dqdr"])
def test_tiles_without_a_row_of_r_compute_no_position_product(kernel, n_calls):
    case = RelAttentionCase(
        "far", B=1, H=1, Tq=80, Tm=0, D=4, R=20, options={"causal": True, "offset": 19}
    )
    skews, tiles = n_calls(kernel, "skew_transposed"), n_calls(kernel, "exponents")
    gradients(case)
    # Keys of tile n have rows for the queries of tiles n, n + 1 and, from distance 17 on, n + 2.
    assert tiles == [5 + 4 + 3 + 2 + 1]
    assert skews == [5 + 4 + 3]


@pytest.mark.parametrize("kernel", ["dkdv", "dqdr"])
def test_a_packed_document_costs_no_tile_of_another(kernel, n_calls):
    starts = [i // 32 * 32 for i in range(96)]
    case = RelAttentionCase(
        "packed", B=1, H=1, Tq=96, Tm=0, D=4, key_start=[starts], options={"causal": True}
    )
    tiles = n_calls(kernel, "exponents")
    gradients(case)
    assert tiles == [3 * (2 + 1)]


@pytest.mark.parametrize("start", WILD)
def test_work_follows_the_keys_that_remain(start, n_calls):
    case = RelAttentionCase(
        "cache",
        B=1,
        H=1,
        Tq=2,
        Ts=64,
        Tm=0,
        D=4,
        q_start=[start],
        key_lens=[22],
        options={"causal": True},
    )
    tiles = n_calls("dqdr", "exponents"), n_calls("dkdv", "exponents")
    gradients(case)
    assert tiles == {-(2**62): ([0], [0]), 20: ([2], [2]), 2**40: ([2], [2])}[start]
