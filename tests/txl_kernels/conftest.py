"""Fixtures of the tests of the kernels: skips with `resolve`'s sentence, and exact arithmetic."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from txl_kernels import resolve
from txl_kernels.ops import rel_attention_plans


@pytest.fixture(autouse=True)
def _no_plans():
    """No test sees a choice of an earlier one, which may have replaced a backend."""
    rel_attention_plans.clear()


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
def _one_patch_per_launch(request, monkeypatch):
    """Triton's interpreter replaces the builtins of `triton.language` once per launch.

    Without this fixture it searches them all again at each call of a device function, which is a
    fifth of the time of these tests, and finds them replaced.
    """
    if request.node.get_closest_marker("interpreted") is None:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched = set()

    def call(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(fn):
        module = fn.__globals__["__name__"]
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(fn)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


def _remembering(create: Callable[..., None], key: Callable[..., Any], own: tuple[str, ...]):
    """An `__init__` that copies the attributes of the first object with the same key.

    It calls `create` for that first object only. The attributes `own` are the call's arguments.
    """
    known: dict[Any, dict[str, Any]] = {}

    def __init__(self, *args):
        attributes = known.get(of := key(*args))
        if attributes is None:
            create(self, *args)
            known[of] = dict(vars(self))
        else:
            vars(self).update(attributes)
            vars(self).update(zip(own, args, strict=False))

    return __init__


@pytest.fixture(autouse=True)
def _no_work_of_the_interpreter_without_effect(request, monkeypatch):
    """Halves the time of interpreted kernels; their results and errors stay the same.

    Without `debug`, Triton's interpreter computes in int64 whether each sum of integers overflows,
    and ignores the result. It also forms and checks the shape of each value anew.
    """
    if request.node.get_closest_marker("interpreted") is None:
        return
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    core = importlib.import_module("triton.language.core")
    assert not builder.options.debug
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    monkeypatch.setattr(builder, "options", options)

    def block_key(element_ty, shape):
        return (str(element_ty), *(getattr(n, "value", n) for n in shape))

    block, tensor = core.block_type, core.tensor
    block_type = _remembering(block.__init__, block_key, own=("element_ty",))
    values = _remembering(tensor.__init__, lambda _, type: str(type), own=("handle", "type"))
    monkeypatch.setattr(block, "__init__", block_type)
    monkeypatch.setattr(tensor, "__init__", values)


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
