"""A row of `hidden` whose target is ignored may hold anything: no loss and no gradient reads it."""

from __future__ import annotations

import math

import pytest
import torch

from txl_kernels import adaptive_loss, adaptive_nll
from txl_kernels.testing import ADAPTIVE_SOFTMAX_CASES, AdaptiveSoftmaxCase

CASES = {case.name: case for case in ADAPTIVE_SOFTMAX_CASES if case.N > 1}
FILLS = {"inf": math.inf, "negative_inf": -math.inf, "largest": 3e38}
OPS = [adaptive_nll, adaptive_loss]
BACKENDS = ["reference", "native"]


def results(op, case: AdaptiveSoftmaxCase, dtype: torch.dtype, value: float, **options):
    """The loss and all gradients, hidden's first, with `value` in every ignored row."""
    hidden, target, head, tails = case.inputs(dtype)
    target[::3] = options.setdefault("ignore_index", -100)
    ignored = target == options["ignore_index"]
    hidden = hidden.detach().masked_fill(ignored[:, None], value).requires_grad_()
    loss = case.call(op, (hidden, target, head, tails), **options)
    leaves = [hidden, *(x for cluster in (head, *tails) for x in cluster if x is not None)]
    # No two tokens' gradients are alike, and those of ignored tokens are not 0.
    factor = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    return [loss, *torch.autograd.grad(loss, leaves, factor)], ignored


def check(op, case: AdaptiveSoftmaxCase, dtype: torch.dtype, value: float, **options) -> None:
    due, _ = results(op, case, dtype, 0.0, **options)
    actual, ignored = results(op, case, dtype, value, **options)
    for n, (x, expected) in enumerate(zip(actual, due, strict=True)):
        assert torch.equal(x, expected), n
        assert x.isfinite().all(), n
    assert not actual[1][ignored].any()


@pytest.mark.parametrize("case", CASES.values(), ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_ignored_rows_changes_nothing(backend, op, case, require_backend):
    require_backend(op.__name__, backend, needs_grad=True)
    check(op, case, torch.float32, math.nan, backend=backend)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["ten_tokens", "no_tails_no_projection"])
@pytest.mark.parametrize("op", OPS)
def test_triton_multiplies_no_ignored_row(op, name, require_backend):
    require_backend(op.__name__, "triton", needs_grad=True)
    check(op, CASES[name], torch.float32, math.nan, backend="triton")


@pytest.mark.parametrize("value", FILLS.values(), ids=FILLS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_value_changes_anything(backend, op, value, require_backend):
    require_backend(op.__name__, backend, needs_grad=True)
    for name in ("two_tails", "no_tails_no_projection"):
        check(op, CASES[name], torch.float32, value, backend=backend)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["fp64", "bf16", "fp16"]
)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype(backend, op, dtype, require_backend):
    require_backend(op.__name__, backend, dtype=dtype, needs_grad=True)
    for name in ("two_tails", "no_projections"):
        check(op, CASES[name], dtype, math.nan, backend=backend)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"ignore_index": 4}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_and_ignored_tokens_of_the_vocabulary(backend, options, require_backend):
    require_backend("adaptive_loss", backend, needs_grad=True)
    check(adaptive_loss, CASES["two_tails"], torch.float32, math.nan, backend=backend, **options)
