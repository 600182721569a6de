"""Interpreted kernels give the same bits and errors with `faster_interpreter` as without."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_attention_with_lse
from txl_kernels.testing import RelAttentionCase
from txl_kernels.testing.interpreter import faster_interpreter

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def _faster_interpreter():
    """Replaces the fixture of all other tests: here the interpreter begins as Triton ships it."""


@pytest.fixture(autouse=True)
def _needs_the_interpreter(require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)


def results(case, dtype):
    floats, others = case.inputs(dtype)
    out, lse = rel_attention_with_lse(**floats, **others, **case.options, backend="triton")
    return [out, lse, *torch.autograd.grad(out, list(floats.values()), case.dout(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_results_are_the_same_bits(dtype):
    options = {"causal": True, "dropout_p": 0.3, "softcap": 5.0, "chunk": (7, 1, 3)}
    case = RelAttentionCase("bits", B=1, H=2, Hk=1, Tq=18, mask=(18, 23), options=options)
    due = results(case, dtype)
    with faster_interpreter():
        actual = results(case, dtype)
    assert all(map(torch.equal, actual, due))


@triton.jit
def _sum_kernel(p_x, p_out, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    tl.store(p_out + o, tl.load(p_x + o) + 2**30)


def test_errors_and_integers_that_overflow_are_the_same():
    x, outs = torch.full((16,), 2**30, dtype=torch.int32), []
    for context in (None, faster_interpreter()):
        with context or torch.no_grad():
            outs.append(torch.empty_like(x))
            _sum_kernel[(1,)](x, outs[-1], 16)
            with pytest.raises(triton.runtime.errors.InterpreterError, match="power of 2"):
                _sum_kernel[(1,)](x, outs[-1], 12)
    assert torch.equal(*outs)
    assert outs[0].eq(-(2**31)).all()


def test_the_interpreter_is_left_as_it_was():
    from triton.runtime import interpreter

    def state():
        owners = (interpreter.GridExecutor, tl.core.tensor, tl.core.block_type)
        methods = [vars(owner).get("__call__", owner.__init__) for owner in owners]
        return [*methods, interpreter._patch_lang, interpreter.interpreter_builder.options]

    due = state()
    with faster_interpreter():
        assert all(a is not b for a, b in zip(state(), due, strict=True))
    assert all(a is b for a, b in zip(state(), due, strict=True))
