"""Which tiles the Triton backward of rel_attention computes, and which gradients it ignores."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from txl_kernels import rel_attention_with_lse
from txl_kernels.backends import triton as package
from txl_kernels.testing import RelAttentionCase, check_rel_attention

pytestmark = pytest.mark.interpreted

WILD = [-(2**62), 20, 2**40]
CASES = [
    RelAttentionCase(
        "position_query",
        B=1,
        H=2,
        Hk=1,
        Tq=20,
        Tm=0,
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
        Tq=9,
        Tm=20,
        R=9,
        q_start=WILD,
        lse_gradient=True,
        options={"window": (11, 2), "chunk": (30, 1, 7), "pos_scale": 0.0},
    ),
    RelAttentionCase(
        "ranges",
        B=1,
        H=2,
        Hk=1,
        Tq=20,
        Tm=5,
        Dp=4,
        R=9,
        q_start=[3],
        key_start=[[7 * i % 23 for i in range(20)]],
        key_lens=[24],
        mask=(1, 2, 20, 25),
        options={"scale": 0.0, "pos_scale": 0.7, "dropout_p": 0.2},
    ),
]


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)


@pytest.fixture
def n_calls(monkeypatch):
    """Counts calls of a function by both kernels from then on: of dk and dv, of dq and dr."""

    def count(function: str) -> list[int]:
        counts = [0, 0]

        def counting(kernel: int, called: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any) -> Any:
                counts[kernel] += 1
                return called(*args)

            return counted

        for kernel, name in enumerate(("dkdv", "dqdr")):
            module = importlib.import_module(f"{package.__name__}.rel_attention_bwd_{name}")
            monkeypatch.setattr(module, function, counting(kernel, getattr(module, function)))
        return counts

    return count


def gradients(
    case: RelAttentionCase, backend: str = "triton", dlse: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of all inputs by name."""
    floats, others = case.inputs(torch.float32)
    results = rel_attention_with_lse(**floats, **others, **case.options, backend=backend)
    dresults = [case.dout(torch.float32), dlse]
    n = 1 if dlse is None else 2
    grads = torch.autograd.grad(results[:n], list(floats.values()), dresults[:n])
    return dict(zip(floats, grads, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_within_the_error_budget(case, poison):
    check_rel_attention(case, "triton", torch.float32, within=poison)


def test_gradient_of_lse_is_ignored_in_rows_without_keys():
    # All queries of the first batch row are before the first key.
    case = RelAttentionCase(
        "dead", B=2, H=1, Tq=12, Tm=0, q_start=[-12, 0], options={"causal": True}
    )
    dlse = torch.randn(2, 1, 12)
    dlse[0] = torch.nan
    actual = gradients(case, dlse=dlse)
    assert not actual["q"][0].any()
    for name, due in gradients(case, "reference", dlse.nan_to_num()).items():
        assert torch.allclose(actual[name], due, atol=1e-5), name


def test_tiles_without_a_row_of_r_compute_no_position_product(n_calls):
    case = RelAttentionCase(
        "far", B=1, H=1, Tq=80, Tm=0, D=4, R=20, options={"causal": True, "offset": 19}
    )
    skews, tiles = n_calls("skew_transposed"), n_calls("exponents")
    gradients(case)
    # Keys of tile n have a row for some queries of tiles n, n + 1 and n + 2 (distances 0 to 19).
    assert tiles == [5 + 4 + 3 + 2 + 1] * 2
    assert skews == [5 + 4 + 3] * 2


def test_a_packed_document_costs_no_tile_of_another(n_calls):
    starts = [i // 32 * 32 for i in range(96)]
    case = RelAttentionCase(
        "packed", B=1, H=1, Tq=96, Tm=0, D=4, key_start=[starts], options={"causal": True}
    )
    tiles = n_calls("exponents")
    gradients(case)
    assert tiles == [3 * (2 + 1)] * 2


@pytest.mark.parametrize(("start", "n_tiles"), list(zip(WILD, (0, 2, 2), strict=True)))
def test_work_follows_the_keys_that_remain(start, n_tiles, n_calls):
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
    tiles = n_calls("exponents")
    gradients(case)
    assert tiles == [n_tiles] * 2
