"""Fixtures of the tests of the kernels: skips with `resolve`'s sentence, and exact arithmetic."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from txl_kernels import resolve
from txl_kernels.ops import few_row_linear, rel_attention_plans
from txl_kernels.testing.interpreter import faster_interpreter


@pytest.fixture(autouse=True)
def _no_plans():
    """No test sees a choice of an earlier one, which may have replaced a backend."""
    rel_attention_plans.clear()
    few_row_linear.checked_calls.clear()


@pytest.fixture(autouse=True)
def _products_of_the_interpreter(request, monkeypatch):
    """Triton's interpreter multiplies in float64 and rounds once.

    NumPy's BLAS adds in an order that depends on the processor and on which operand comes first:
    the scores that backward recomputes would differ from forward's by several roundings. A GPU adds
    in one order.
    """
    if request.node.get_closest_marker("interpreted") is None:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _faster_interpreter(request):
    if request.node.get_closest_marker("interpreted") is None:
        yield
        return
    with faster_interpreter():
        yield


@pytest.fixture
def require_backend():
    """Skips the test where `resolve` says that the named backend does not serve the call."""

    def require(op: str, backend: str, **call: Any) -> None:
        call = {"device": "cpu", "dtype": torch.float32, **call}
        _, reason = resolve(op, backend=backend, **call)
        if reason is not None:
            pytest.skip(reason)

    return require


@pytest.fixture
def exact_mask():
    """The keys that queries attend to by window and chunk, in Python's exact integers."""

    def allowed(i, j, Tq, Tk, causal, window, chunk):
        p = i + Tk - Tq
        left, right = window
        seen = not causal or j <= p
        seen = seen and (left is None or j >= p - left) and (right is None or j <= p + right)
        if chunk:
            size, n_left, phase = (*chunk, 0)[:3]
            seen = seen and 0 <= (p + phase) // size - (j + phase) // size <= n_left
        return seen

    def mask(Tq, Tk, *, causal=False, window=(None, None), chunk=()):
        rows = [
            [allowed(i, j, Tq, Tk, causal, window, chunk) for j in range(Tk)] for i in range(Tq)
        ]
        return torch.tensor(rows)

    return mask
