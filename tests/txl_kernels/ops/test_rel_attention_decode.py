"""rel_attention for few queries without gradients, as decoding calls it, on every device here."""

from __future__ import annotations

import functools

import pytest
import torch

from txl_kernels import rel_attention, rel_attention_with_lse
from txl_kernels.testing import DECODE_CASES, check_budget, check_rel_attention_output

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, require_backend):
    """A device that native decodes on."""
    require_backend("rel_attention", "native", device=request.param)
    return request.param


@pytest.fixture
def cuda(require_backend):
    require_backend("rel_attention", "native", device="cuda")
    return "cuda"


def decode(**call):
    return rel_attention_with_lse(**call, backend="native")


def detached(case, dtype, device):
    floats, others = case.inputs(dtype, device)
    return {name: tensor.detach() for name, tensor in floats.items()} | others | case.options


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_output_and_lse_are_within_the_error_budget(dtype, case, device):
    check_rel_attention_output(case, dtype, decode, device)


def one_step(device, dtype, B=32, H=16, Tk=3800, D=64):
    """One token's attention over a long memory, of the size that decoding is measured at."""
    generator = torch.Generator(device).manual_seed(7)
    normal = functools.partial(torch.randn, device=device, dtype=dtype, generator=generator)
    call = {name: normal(B, H, 1, D) for name in ("q", "k", "v")}
    call |= {name: normal(B, H, Tk - 1, D) for name in ("mem_k", "mem_v")}
    call["r"] = normal(1, H, Tk, D)
    call |= {name: normal(H, D) for name in ("r_w_bias", "r_r_bias")}
    return call | {"causal": True}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.gpu
def test_a_step_at_full_size_is_within_the_error_budget(dtype, cuda):
    call = one_step(cuda, dtype)
    out, lse = decode(**call)
    for b in (0, 31):  # the reference materialises float64 copies: row by row
        row = {
            name: x[b : b + 1] if name in ("q", "k", "v", "mem_k", "mem_v") else x
            for name, x in call.items()
        }
        wide = {name: x.double() if torch.is_tensor(x) else x for name, x in row.items()}
        due, due_lse = rel_attention_with_lse(**wide, backend="reference")
        plain = rel_attention(**row, backend="reference")
        check_budget("out", out[b : b + 1], due, plain, dtype=dtype)
        check_budget("lse", lse[b : b + 1], due_lse, due_lse, dtype=torch.float32)


def test_auto_decodes_on_native(device):
    call = one_step(device, torch.float32, B=2, Tk=50)
    assert torch.equal(rel_attention(**call), rel_attention(**call, backend="native"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_each_call_gives_the_same_bits(dtype, device):
    call = one_step(device, dtype, B=3, Tk=700)
    first = decode(**call)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, decode(**call), strict=True))


@pytest.mark.parametrize("Tq", [1, 4, 16])
def test_a_block_of_queries_equals_one_query_at_a_time(Tq, device):
    B, H, Tm, D = 2, 3, 60, 41
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, B, H, Tm + Tq, D, generator=generator).to(device).unbind()
    r = torch.randn(1, H, Tm + Tq, D, generator=generator).to(device)
    block = rel_attention(
        q[:, :, Tm:], k[:, :, Tm:], v[:, :, Tm:], r,
        mem_k=k[:, :, :Tm], mem_v=v[:, :, :Tm], causal=True, backend="native",
    )  # fmt: skip
    for i in range(Tq):
        seen = Tm + i + 1
        one = rel_attention(
            q[:, :, seen - 1 : seen], k[:, :, :seen], v[:, :, :seen], r[:, :, -seen:],
            causal=True, backend="native",
        )  # fmt: skip
        torch.testing.assert_close(block[:, :, i : i + 1], one, rtol=1e-4, atol=1e-5)


def test_lengths_far_out_of_range_are_clamped(device):
    call = one_step(device, torch.float32, B=4, Tk=90)
    wild = torch.tensor([2**62, -(2**62), 91, 7], device=device)
    out, lse = decode(**call, key_lens=wild)
    due, due_lse = decode(**call, key_lens=wild.clamp(0, 90))
    assert torch.equal(out, due)
    assert torch.equal(lse, due_lse)
    assert lse[1].isneginf().all()


@pytest.mark.gpu
def test_another_stream_is_followed(cuda):
    call = one_step(cuda, torch.float32, B=8)
    due, _ = decode(**call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call["q"].mul_(1.0)
        out, _ = decode(**call)
    stream.synchronize()
    assert torch.equal(out, due)


@pytest.mark.gpu
def test_gradients_and_long_queries_are_left_to_other_backends(cuda, require_backend):
    call = one_step(cuda, torch.bfloat16, B=2, Tk=40)
    call["q"].requires_grad_()
    out = rel_attention(**call)
    (dq,) = torch.autograd.grad(out.float().sum(), call["q"])
    assert dq.isfinite().all()
