"""Properties of the native kernels alone: instruction sets, threads, bounds and memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from txl_kernels import rel_attention
from txl_kernels.backends import native
from txl_kernels.testing import REL_ATTENTION_CASES, check_rel_attention

ROOT = Path(__file__).parents[2]
PAGE = mmap.PAGESIZE

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_is_within_the_error_budget(capability, require_instruction_set):
    require_instruction_set(capability)
    # All other tests run the best set for this processor; ATen's setting selects the others.
    parity = "tests/txl_kernels/ops/test_rel_attention.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "native",
        parity,
    ]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def attend_and_differentiate(threads, B=3, H=5, Tq=200, Tm=90, D=24, dtype=torch.float32):
    """Output and gradients of one causal call whose rows are of unequal length."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": Tq, "k": Tq, "v": Tq, "mem_k": Tm, "mem_v": Tm}
    inputs = {
        name: torch.randn(B, H, T, D, generator=generator).to(dtype).requires_grad_()
        for name, T in shapes.items()
    }
    inputs["r"] = torch.randn(1, H, Tq + Tm, D, generator=generator).to(dtype).requires_grad_()
    inputs["r_w_bias"] = torch.randn(H, D, generator=generator).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = rel_attention(
            **inputs,
            causal=True,
            key_lens=torch.tensor([290, 17, 150][:B]),
            dropout_p=0.1,
            dropout_seed=torch.tensor(5),
            backend="native",
        )
        return [out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_thread_count_gives_the_same_bits_every_time(threads, dtype):
    first = attend_and_differentiate(threads, dtype=dtype)
    for _ in range(3):
        again = attend_and_differentiate(threads, dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 8)], ids=["B3H5", "B1H1", "B2H8"])
@pytest.mark.parametrize("threads", [2, 5, 16])
def test_work_cut_anywhere_sums_to_the_same(threads, shape):
    B, H = shape
    whole = attend_and_differentiate(1, B=B, H=H)
    for cut, due in zip(attend_and_differentiate(threads, B=B, H=H), whole, strict=True):
        assert torch.allclose(cut, due, rtol=1e-5, atol=1e-5 * float(due.detach().abs().max()))


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that ends where the next page may not be read."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE) + 1
    region = mmap.mmap(-1, pages * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    fence = ctypes.c_void_p(address + (pages - 1) * PAGE)
    assert libc.mprotect(fence, PAGE, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
    offset = (pages - 1) * PAGE - size
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("D", [1, 41, 64])
@pytest.mark.parametrize("lengths", [(1, 30), (17, 5), (70, 603)], ids=["1+30", "17+5", "70+603"])
def test_nothing_is_read_behind_the_tensors(lengths, D, dtype):
    Tq, Tm = lengths
    sizes = {"q": Tq, "k": Tq, "v": Tq, "mem_k": Tm, "mem_v": Tm, "r": Tq + Tm}
    inputs = {
        name: fenced(torch.randn(1, 1, T, D).to(dtype)).requires_grad_()
        for name, T in sizes.items()
    }
    wild = torch.tensor([2**40])
    out = rel_attention(**inputs, causal=True, key_lens=wild, backend="native")
    grads = torch.autograd.grad(
        out, list(inputs.values()), fenced(torch.randn(out.shape).to(dtype))
    )
    assert all(grad.isfinite().all() for grad in (out, *grads))


def test_padding_behind_the_key_lengths_is_never_read():
    inputs = {name: torch.randn(2, 2, 40, 16) for name in ("q", "k", "v")}
    r, lengths = torch.randn(1, 2, 79, 16), torch.tensor([40, 21])
    due = rel_attention(**inputs, r=r, key_lens=lengths, backend="native")
    for name in ("k", "v"):
        inputs[name][1, :, 21:] = float("nan")
    assert torch.equal(rel_attention(**inputs, r=r, key_lens=lengths, backend="native"), due)


MEMORY = """
import re, torch
from txl_kernels import rel_attention
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1000
def normal(T):
    return torch.randn(1, 2, T, 64, requires_grad=True)
def run(T):
    q, k, v, mem_k, mem_v = (normal(T) for _ in range(5))
    r = normal(2 * T)
    before = peak()
    out = rel_attention(q, k, v, r, mem_k=mem_k, mem_v=mem_v, causal=True, backend="native")
    torch.autograd.grad(out.sum(), [q, k, v, r, mem_k, mem_v])
    return peak() - before
run(64)
print(run(8192))
"""


def test_peak_memory_does_not_grow_with_queries_times_keys():
    # The scores of one head alone would be 537 MB; inputs and gradients are 4 to 8 MB each.
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 150


GROWTH = """
import random, re, sys, torch
from txl_kernels import rel_attention
torch.set_num_threads(2)
random.seed(0)
dtype = getattr(torch, sys.argv[1])
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1000
def stream(length):
    with torch.no_grad():
        rel_attention(q[:, :, :1], k[:, :, :length], v[:, :, :length], r[:, :, :length], offset=0)
def train(length):
    leaves = [x[:, :, :length].detach().requires_grad_() for x in (q, k, v, r)]
    torch.autograd.grad(rel_attention(*leaves, causal=True).float().sum(), leaves)
q, k, v, r = (torch.randn(2, 4, 1200, 64, dtype=dtype) for _ in range(4))
for run, lengths in ((stream, range(1, 1200, 2)), (train, random.sample(range(50, 600), 120))):
    for step, length in enumerate(lengths):
        run(length)
        if step == len(lengths) // 6:
            start = resident()
    print(resident() - start)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_lengths_do_not_take_new_memory(dtype):
    # With a product for every number of keys, the stream alone took 2 GB with AVX-512.
    command = [sys.executable, "-c", GROWTH, dtype]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    stream, training = map(float, run.stdout.split())
    assert stream < 20
    assert training < 50


def test_negative_and_zero_scales_are_served():
    for scale in (-0.4, 0.0):
        for case in REL_ATTENTION_CASES:
            if case.name in ("transformer_xl", "softcap"):
                options = {**case.options, "scale": scale}
                check_rel_attention(
                    type(case)(**{**vars(case), "options": options}), "native", torch.float32
                )
