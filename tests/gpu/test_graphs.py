"""Calls that are captured in a CUDA graph and replayed on other inputs give the call's own bits."""

from __future__ import annotations

import pytest
import torch

from tools.gpu.memory import captured
from txl_kernels import adaptive_embedding, adaptive_loss, adaptive_nll, rel_attention, resolve
from txl_kernels.testing import ADAPTIVE_SOFTMAX_CASES, DECODE_CASES, REL_ATTENTION_CASES
from txl_kernels.testing.poison import filled_with_nan

pytestmark = pytest.mark.gpu

TRAINED = ("transformer_xl", "conformer", "long", "window", "everything")
SOFTMAXES = {op.__name__: op for op in (adaptive_loss, adaptive_nll)}


def require(op, backend, device, **call):
    _, reason = resolve(op, backend=backend, device=device, dtype=torch.float16, **call)
    if reason is not None:
        pytest.skip(reason)


def check_replay(call, inputs, others, device):
    """`call` returns tensors that it computes from `inputs`; `others` replace their values."""
    results = []
    replay = captured(lambda: results.append(call()), torch.device(device))
    if device == "cuda":
        found = results[-1]  # the memory that a replay writes to
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    replay()
    if device != "cuda":
        found = results[-1]
    for n, (x, y) in enumerate(zip(found, call(), strict=True)):
        assert torch.equal(x, y), f"tensor {n} differs in a replay"


def rolled(tensors):
    return [x.detach().roll(1, -1).clone() for x in tensors]


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("case", [x for x in REL_ATTENTION_CASES if x.name in TRAINED], ids=str)
def test_training(case, backend, device):
    require("rel_attention", backend, device, D=case.D, needs_grad=True, uses=case.uses)
    floats, others = case.inputs(torch.float16, device)
    dout = case.dout(torch.float16, device)
    leaves = list(floats.values())

    def call():
        out = rel_attention(**floats, **others, **case.options, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    with filled_with_nan(deterministic=True):
        check_replay(call, [*leaves, dout], rolled([*leaves, dout]), device)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("case", DECODE_CASES[:8], ids=str)
def test_decoding(case, backend, device):
    require("rel_attention", backend, device, Tq=case.Tq, D=case.D, uses=case.uses)
    floats, others = case.inputs(torch.float16, device)
    floats = {name: x.detach() for name, x in floats.items()}

    def call():
        options = {**others, **case.options, "return_lse": True}
        return rel_attention(**floats, **options, backend=backend)

    check_replay(call, list(floats.values()), rolled(floats.values()), device)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("op", [*SOFTMAXES, "adaptive_embedding"])
def test_softmax_and_embedding(op, backend, device):
    case = ADAPTIVE_SOFTMAX_CASES[0]
    require(op, backend, device, needs_grad=True)
    inputs = case.inputs(torch.float16, device)
    hidden, target, head, tails = inputs
    leaves = [hidden, *head, *(x for tail in tails for x in tail)]
    tables = [weight.detach().requires_grad_() for _, weight, _ in (head, *tails)]
    sizes = [b - a for a, b in zip((0, *case.cutoffs), (*case.cutoffs, case.V), strict=True)]
    tables = [x[:n].detach().requires_grad_() for x, n in zip(tables, sizes, strict=True)]

    def call():
        if op in SOFTMAXES:
            value = case.call(SOFTMAXES[op], inputs, backend=backend)
            return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]
        projections = [x.detach().mT.contiguous() for x, *_ in (head, *tails)]
        tokens = target.clamp(min=0)
        out = adaptive_embedding(tokens, tables, projections, case.cutoffs, 2.0, backend=backend)
        return [out.detach(), *torch.autograd.grad(out.sum(), tables)]

    check_replay(call, [*leaves, target], rolled([*leaves, target]), device)
