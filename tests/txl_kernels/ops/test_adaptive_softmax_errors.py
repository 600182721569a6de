"""Each bad argument of the adaptive softmax ops gets one error that names it."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import (
    BackendUnavailableError,
    adaptive_log_prob,
    adaptive_loss,
    adaptive_nll,
    adaptive_topk,
)

N, D = 6, 8
TARGET = torch.tensor([0, 9, 10, 24, 25, 49])


def _valid():
    """Fifty tokens: ten in the head, two tails."""
    tails = [
        (torch.zeros(4, D), torch.zeros(15, 4), torch.zeros(15)),
        (torch.zeros(2, D), torch.zeros(25, 2), None),
    ]
    return {
        "hidden": torch.zeros(N, D),
        "head_weight": torch.zeros(12, D),
        "tails": tails,
        "cutoffs": (10, 25),
        "head_bias": torch.zeros(12),
    }


def _tail(projection=(4, D), weight=(15, 4), bias=(15,), dtype=torch.float32):
    shapes = (projection, weight, bias)
    return [tuple(torch.zeros(shape, dtype=dtype) for shape in shapes), _valid()["tails"][1]]


BAD = [
    ({"hidden": None}, TypeError, "hidden must be a tensor, got NoneType"),
    ({"hidden": torch.zeros(2, 3, D)}, ValueError, r"hidden must have shape \[N, d\]"),
    ({"hidden": torch.zeros(N, D).int()}, TypeError, "hidden must be torch.float32 or"),
    ({"head_weight": None}, TypeError, "head_weight must be a tensor"),
    ({"head_weight": torch.zeros(12, 7)}, ValueError, r"head_weight must have shape \[V_k, 8\]"),
    ({"head_weight": torch.zeros(12, D).half()}, TypeError, "head_weight must be torch.float32"),
    ({"head_bias": torch.zeros(10)}, ValueError, r"head_bias must have shape \[12\], got \[10\]"),
    ({"head_proj": torch.zeros(D, 7)}, ValueError, r"head_proj must have shape \[d_k, 8\]"),
    ({"head_proj": torch.zeros(7, D)}, ValueError, r"head_weight must have shape \[V_k, 7\]"),
    ({"tails": [torch.zeros(15, 4)]}, ValueError, r"tails\[0\] must be \(projection, weight"),
    ({"tails": [(None, None, None)]}, TypeError, r"the weight of tails\[0\] must be a tensor"),
    ({"tails": _tail(projection=(4, 7))}, ValueError, r"the projection of tails\[0\] must have"),
    ({"tails": _tail(weight=(15, 5))}, ValueError, r"the weight of tails\[0\] must have shape"),
    ({"tails": _tail(bias=(14,))}, ValueError, r"the bias of tails\[0\] must have shape \[15\]"),
    ({"tails": _tail(dtype=torch.float64)}, TypeError, r"the projection of tails\[0\] must be"),
    ({"tails": []}, ValueError, r"cutoffs must be \[\]"),
    ({"cutoffs": (10, 26)}, ValueError, r"cutoffs must be \[10, 25\].*got \[10, 26\]"),
    ({"cutoffs": ()}, ValueError, "cutoffs must be"),
    ({"cutoffs": "10"}, TypeError, "cutoffs must be a sequence"),
    ({"head_weight": torch.zeros(2, D), "head_bias": None}, ValueError, "must hold a token"),
    ({"head_bias": torch.zeros(12, device="meta")}, ValueError, "head_bias must be on cpu"),
    ({"backend": "cpu"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
@pytest.mark.parametrize("op", [adaptive_nll, adaptive_log_prob], ids=lambda op: op.__name__)
def test_bad_argument(op, change, error, message):
    call = {**_valid(), **({"target": TARGET} if op is adaptive_nll else {}), **change}
    with pytest.raises(error, match=f"{op.__name__}: .*{message}"):
        op(**call)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ([1, 2], TypeError, "target must be a tensor"),
        (TARGET.int(), TypeError, "target must be torch.int64, got torch.int32"),
        (TARGET[:5], ValueError, r"target must have shape \[6\], got \[5\]"),
        (TARGET.to("meta"), ValueError, "target must be on cpu, got meta"),
        (TARGET + 1, IndexError, r"target must be in \[0, 50\), got 50"),
        (TARGET - 1, IndexError, r"target must be in \[0, 50\), got -1"),
    ],
)
@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss], ids=lambda op: op.__name__)
def test_bad_target(op, target, error, message):
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(**{**_valid(), "target": target})


@pytest.mark.parametrize(
    ("backend", "error"), [("reference", RuntimeError), ("native", IndexError)]
)
def test_a_bad_target_raises_inside_a_compiled_graph(backend, error, require_backend):
    require_backend("adaptive_nll", backend)
    torch.compiler.reset()
    call = {**_valid(), "backend": backend}
    compiled = torch.compile(
        lambda target: adaptive_nll(target=target, **call), fullgraph=True, backend="aot_eager"
    )
    compiled(TARGET)
    with pytest.raises(error, match=r"target must be in \[0, 50\)"):
        compiled(TARGET + 1)


@pytest.mark.parametrize("reduction", ["none", None])
def test_bad_reduction(reduction):
    with pytest.raises(ValueError, match="adaptive_loss: reduction must be 'mean' or 'sum', got"):
        adaptive_loss(**_valid(), target=TARGET, reduction=reduction)


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (51, ValueError), (1.0, TypeError)])
def test_bad_k(k, error):
    with pytest.raises(error, match=r"adaptive_topk: k must be .*, got"):
        adaptive_topk(**_valid(), k=k)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_backend_that_lacks_the_op(backend):
    with pytest.raises(BackendUnavailableError, match=f"this package has no {backend} backend"):
        adaptive_log_prob(**_valid(), backend=backend)
