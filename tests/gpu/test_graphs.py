"""Calls captured in a CUDA graph and replayed on other inputs give the bits of the call itself."""

from __future__ import annotations

import functools

import pytest
import torch

from tools.gpu.memory import MODEL, TOLERANCE, captured, graph_difference
from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.model import TransformerXL
from txl_kernels import rel_attention
from txl_kernels.testing import DECODE_CASES, REL_ATTENTION_CASES
from txl_kernels.testing.poison import filled_with_nan

pytestmark = pytest.mark.gpu

NAMES = ("transformer_xl", "conformer", "long", "window", "everything")
CASES = [("triton", True, case) for case in REL_ATTENTION_CASES if case.name in NAMES]
CASES += [(x, False, case) for x in ("native", "triton") for case in DECODE_CASES[:8]]


@pytest.mark.parametrize(("backend", "trains", "case"), CASES, ids=str)
def test_attention(backend, trains, case, device):
    floats, others = case.inputs(torch.float16, device)
    leaves, dout = list(floats.values()), case.dout(torch.float16, device)
    attend = functools.partial(rel_attention, **floats, **others, **case.options, backend=backend)
    results = []

    def call():
        with torch.set_grad_enabled(trains):
            out, grads = attend(), []
        if trains:
            grads = torch.autograd.grad(out, leaves, dout)
        results.append([out.detach(), *grads])

    with filled_with_nan(deterministic=True):
        replay = captured(call, torch.device(device))
        with torch.no_grad():
            for x in (*leaves, dout):
                x.copy_(x.roll(1, -1).clone())
        replay()
        replayed = results[-1]  # a replay writes to the tensors of the capture
        call()
    for n, (found, expected) in enumerate(zip(replayed, results[-1], strict=True)):
        assert torch.equal(found, expected), f"tensor {n} differs in a replay"


def test_a_training_step(device):
    assert graph_difference(torch.device(device)) <= TOLERANCE


def test_decoding_steps(device):
    """A step that reads its own token, with kept keys copied and tokens forgotten in between."""
    torch.manual_seed(0)
    model = TransformerXL(MODEL).to(device).eval()
    prompt = torch.randint(MODEL.vocab_size, (2, 70), device=device)
    texts = []
    for make in (captured, lambda step, _: step):
        with torch.no_grad():
            window = KeyValueWindow.empty(model, 2, slack=70).make_room(9, segment_len=69)
            token = prompt[:, -1:].clone()
            step = functools.partial(_read_and_choose, model, window, token)
            run = make(step, torch.device(device))
            window.reset(torch.ones(2, dtype=torch.bool, device=device))
            model(prompt[:, :-1], window)
            token.copy_(prompt[:, -1:])
            text = []
            for n in range(27):
                if n % 9 == 0:
                    window.make_room(9)
                run()
                text.append(token.clone())
            texts.append(torch.cat(text, dim=1))
    assert torch.equal(*texts)


def _read_and_choose(model, window, token):
    log_probs = model.log_probs(model(token, window).hidden[:, -1])
    token.copy_(log_probs.argmax(-1, keepdim=True))
