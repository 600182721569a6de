"""Every named case of every op on a GPU against float64, with all gradients; equal bits of runs.

New memory holds NaN.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from tools.gpu.parity import RUNS, check_attention, check_decoding
from txl_kernels import rel_shift
from txl_kernels.testing import (
    ADAPTIVE_SOFTMAX_CASES,
    DECODE_CASES,
    REL_ATTENTION_CASES,
    check_adaptive_embedding,
    check_adaptive_softmax,
)
from txl_kernels.testing.poison import filled_with_nan

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Leading sizes, Tq, R; keys; offset.
SHIFTS = (((2, 3, 5, 9), None, None), ((2, 7, 3), 20, 4), ((3, 4, 6), 5, -2), ((0, 4, 6), 3, 2**40))
SHIFTS += (((2, 17, 401), 230, None), ((2, 3, 5), 0, None), ((8, 4, 256, 1000), 513, None))


def params(cases, *backends):
    values = list(itertools.product(cases, backends, DTYPES))
    return pytest.mark.parametrize(("case", "backend", "dtype"), values, ids=str)


@params(REL_ATTENTION_CASES, "triton")
def test_attention(case, backend, dtype, device):
    check_attention(case, backend, dtype, device)


@params(DECODE_CASES, "native", "triton")
def test_decoding(case, backend, dtype, device):
    check_decoding(case, backend, dtype, device)


@params(ADAPTIVE_SOFTMAX_CASES, "triton")
@pytest.mark.parametrize("op", ["adaptive_loss", "adaptive_nll", "adaptive_embedding"])
def test_softmax_and_embedding(op, case, backend, dtype, device):
    check = functools.partial(check_adaptive_softmax, op)
    check = check_adaptive_embedding if op == "adaptive_embedding" else check
    check(case.inputs(dtype, device), case.cutoffs, backend, runs=RUNS, within=filled_with_nan)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(("shape", "n_keys", "offset"), SHIFTS, ids=str)
def test_the_shift_is_the_reference_bit_by_bit(shape, n_keys, offset, backend, dtype, device):
    # One element into an allocation: rows begin at every alignment.
    memory = torch.randn(1 + torch.Size(shape).numel(), device=device).to(dtype)
    x = memory[1:].view(shape).requires_grad_()
    results = []
    for name in (backend, "reference"):
        out = rel_shift(x, n_keys=n_keys, offset=offset, backend=name)
        dout = torch.arange(out.numel(), device=device).remainder(251).to(dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, x, dout)))
    assert all(map(torch.equal, *results))
