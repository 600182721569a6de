"""Each bad argument of rel_attention gets one error that names it, what was due and what came."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import BackendUnavailableError, rel_attention
from txl_kernels.ops import rel_attention as module
from txl_kernels.ops import rel_attention_calls

B, H, Tq, Tm, D = 2, 3, 5, 4, 8
Tk = Tm + Tq


def _valid():
    q, k, v = (torch.randn(B, H, Tq, D) for _ in range(3))
    mem_k, mem_v = (torch.randn(B, H, Tm, D) for _ in range(2))
    r = torch.randn(1, H, Tk, D)
    return {"q": q, "k": k, "v": v, "r": r, "mem_k": mem_k, "mem_v": mem_v}


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


META = {"device": "meta"}
BAD = [
    # shapes
    ("q", zeros(B, H, D), ValueError, r"q must have shape \[B, H, Tq, D\], got \[2, 3, 8\]"),
    ("q", zeros(B, H, Tq, 0), ValueError, "q must have|k must have"),
    (
        "k",
        zeros(B, H, Tq, 7),
        ValueError,
        r"k must have shape \[2, Hk, Ts, 8\], got \[2, 3, 5, 7\]",
    ),
    ("k", zeros(B, 2, Tq, D), ValueError, "q must have a multiple of k's 2 heads, got 3 heads"),
    ("k", zeros(B, 0, Tq, D), ValueError, "q must have a multiple of k's 0 heads"),
    ("k", zeros(B, 1, Tq, D), ValueError, r"v must have shape \[2, 1, 5, Dv\]"),
    ("v", zeros(B, H, 6, D), ValueError, r"v must have shape \[2, 3, 5, Dv\]"),
    ("v", zeros(B, H, Tq, 0), ValueError, "v must have a head size"),
    ("r", zeros(H, Tk, D), ValueError, r"r must have shape \[1 or 2, 1 or 3, R, 8\]"),
    ("r", zeros(4, H, Tk, D), ValueError, "r must have shape"),
    ("r", zeros(1, H, 0, D), ValueError, "r must have at least one row"),
    ("r_w_bias", zeros(H, 7), ValueError, r"r_w_bias must have shape \[3, 8\], got \[3, 7\]"),
    ("r_r_bias", zeros(D), ValueError, "r_r_bias must have shape"),
    ("mem_k", zeros(B, H, Tm, 7), ValueError, "mem_k must have shape"),
    ("mem_k", zeros(B, 1, Tm, D), ValueError, r"mem_k must have shape \[2, 3, Tm, 8\]"),
    ("mem_v", zeros(B, H, Tm + 1, D), ValueError, r"mem_v must have shape \[2, 3, 4, 8\]"),
    ("mem_k", None, ValueError, "given together, got mem_k=None"),
    ("q_pos", zeros(B, H, 4, D), ValueError, "q_pos must have shape"),
    ("q_pos", zeros(B, H, Tq, 6), ValueError, r"r must have shape .* 6\], got"),
    ("q_pos", zeros(B, H, Tq, 0), ValueError, "q_pos must have a head size of at least 1, got 0"),
    ("q_start", zeros(B, Tq, dtype=torch.int64), ValueError, r"q_start must have shape \[2\]"),
    ("key_start", zeros(3, dtype=torch.int64), ValueError, r"must have shape \[2\] or \[2, 5\]"),
    ("key_start", zeros(1, Tq, dtype=torch.int64), ValueError, r"\[2, 5\], got \[1, 5\]"),
    ("key_lens", zeros((), dtype=torch.int64), ValueError, "key_lens must have shape"),
    ("mask", torch.ones(Tq, Tq, dtype=torch.bool), ValueError, r"broadcast to \[2, 3, 5, 9\]"),
    ("mask", torch.ones(1, 1, 1, 1, 1, dtype=torch.bool), ValueError, "mask must broadcast"),
    ("bias", zeros(4, Tk), ValueError, "bias must broadcast"),
    ("dropout_seed", zeros(2, dtype=torch.int64), ValueError, "dropout_seed must have one element"),
    # types and dtypes
    ("q", [1.0], TypeError, "q must be a tensor, got list"),
    ("k", None, TypeError, "k must be a tensor, got NoneType"),
    ("mem_v", 3.0, TypeError, "mem_v must be a tensor, got float"),
    ("q", zeros(B, H, Tq, D, dtype=torch.int64), TypeError, "q must be .*, got torch.int64"),
    ("v", zeros(B, H, Tq, D, dtype=torch.float16), TypeError, "v must be torch.float32, got torch"),
    ("r", zeros(1, H, Tk, D, dtype=torch.float64), TypeError, "r must be torch.float32"),
    ("r_w_bias", zeros(H, D, dtype=torch.bfloat16), TypeError, "r_w_bias must be torch.float32"),
    ("bias", zeros(Tq, Tk, dtype=torch.bool), TypeError, "bias must be"),
    ("mask", zeros(Tq, Tk), TypeError, "mask must be torch.bool, got torch.float32"),
    ("q_start", zeros(B), TypeError, "q_start must be torch.int32 or torch.int64"),
    ("q_start", 3, TypeError, "q_start must be a tensor, got int"),
    ("key_lens", zeros(B), TypeError, "key_lens must be torch.int32 or torch.int64"),
    ("dropout_seed", zeros(1), TypeError, "dropout_seed must be torch.int64"),
    # devices
    ("k", zeros(B, H, Tq, D, **META), ValueError, "k must be on cpu, got meta"),
    ("r_r_bias", zeros(H, D, **META), ValueError, "r_r_bias must be on cpu, got meta"),
    ("mask", zeros(1, dtype=torch.bool, **META), ValueError, "mask must be on cpu"),
    ("q_pos", zeros(B, H, Tq, D, **META), ValueError, "q_pos must be on cpu, got meta"),
    ("q_start", zeros(B, dtype=torch.int64, **META), ValueError, "q_start must be on cpu"),
    ("key_start", zeros(B, dtype=torch.int64, **META), ValueError, "key_start must be on cpu"),
    ("dropout_seed", zeros(1, dtype=torch.int64, **META), ValueError, "dropout_seed must be on"),
    # numbers
    ("clamp", True, ValueError, "clamp=True needs an explicit offset, got offset=None"),
    ("clamp", 1, TypeError, "clamp must be True or False, got 1"),
    ("causal", "yes", TypeError, "causal must be True or False, got 'yes'"),
    ("offset", 1.5, TypeError, "offset must be an integer, got 1.5"),
    ("offset", True, TypeError, "offset must be an integer, got True"),
    ("window", 4, ValueError, r"window must be \(left, right\), got 4"),
    ("window", (4,), ValueError, r"window must be \(left, right\), got \(4,\)"),
    ("window", (-1, 0), ValueError, "window's left must be at least 0, got -1"),
    ("window", (0, -2), ValueError, "window's right must be at least 0, got -2"),
    ("window", (0.5, 0), TypeError, "window's left must be an integer"),
    ("chunk", (4,), ValueError, "chunk must be"),
    ("chunk", (0, 1), ValueError, "chunk's size must be at least 1, got 0"),
    ("chunk", (4, -1), ValueError, "chunk's left must be at least 0, got -1"),
    ("chunk", (4, 1, None), TypeError, "chunk's phase must be an integer"),
    ("scale", "1", TypeError, "scale must be a number, got '1'"),
    ("scale", float("nan"), ValueError, "scale must be finite, got nan"),
    ("pos_scale", float("inf"), ValueError, "pos_scale must be finite, got inf"),
    ("pos_scale", float("nan"), ValueError, "pos_scale must be finite, got nan"),
    ("pos_scale", "1", TypeError, "pos_scale must be a number, got '1'"),
    ("softcap", -1.0, ValueError, "softcap must be at least 0, got -1.0"),
    ("dropout_p", 1.0, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ("dropout_p", -0.1, ValueError, "dropout_p must be"),
    ("dropout_p", float("nan"), ValueError, "dropout_p must be"),
    ("dead_rows", "mean", ValueError, "dead_rows must be 'zero' or 'uniform', got 'mean'"),
    ("backend", "cuda", ValueError, "backend must be one of auto, reference, native, triton"),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), BAD, ids=[f"{i}-{bad[0]}" for i, bad in enumerate(BAD)]
)
def test_bad_argument(name, value, error, message, monkeypatch):
    """Refused before any backend gets to see it, so before any launch."""
    monkeypatch.setattr(module, "forward", None)
    monkeypatch.setattr(rel_attention_calls, "reference", None)
    with pytest.raises(error, match=message) as caught:
        rel_attention(**{**_valid(), name: value})
    assert str(caught.value).startswith("rel_attention: ")


def test_backend_that_cannot_run_here():
    valid = {name: tensor.double() for name, tensor in _valid().items()}
    with pytest.raises(BackendUnavailableError, match=r"rel_attention: [Tt]riton"):
        rel_attention(**valid, backend="triton")


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("bias", {"bias": torch.zeros(Tq, Tk)}),
        ("dead_rows='uniform'", {"dead_rows": "uniform"}),
    ],
)
def test_backend_that_does_not_serve_an_argument(name, extra, require_backend):
    require_backend("rel_attention", "native")
    with pytest.raises(BackendUnavailableError, match=f"native does not support {name} yet"):
        rel_attention(**_valid(), **extra, backend="native")
    rel_attention(**_valid(), **extra)  # "auto" goes on to the reference
