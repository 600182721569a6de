"""Properties of the native kernels alone: instruction sets, threads, runs of tiles and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from txl_kernels import rel_attention_with_lse
from txl_kernels.backends import native
from txl_kernels.testing import REL_ATTENTION_CASES, check_rel_attention

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_is_within_the_error_budget(capability, require_instruction_set):
    require_instruction_set(capability)
    # All other tests run the best set for this processor; ATen's setting selects the others.
    ops = "tests/txl_kernels/ops"
    parity = [f"{ops}/test_rel_attention.py", f"{ops}/test_rel_attention_decode.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "native or error_budget and cpu",
        *parity,
    ]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def differentiate(threads, inputs, **options):
    """Output, lse and the gradients of all inputs of one call."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse = rel_attention_with_lse(**leaves, **options, backend="native")
        loss = out.double().square().sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()
        return [out, lse, *torch.autograd.grad(loss, list(leaves.values()))]
    finally:
        torch.set_num_threads(before)


def unequal_rows(threads, B=3, H=5, Tq=200, Tm=90, D=24, dtype=torch.float32):
    """A causal call whose rows are of unequal length."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": Tq, "k": Tq, "v": Tq, "mem_k": Tm, "mem_v": Tm}
    inputs = {
        name: torch.randn(B, H, T, D, generator=generator).to(dtype) for name, T in shapes.items()
    }
    inputs["r"] = torch.randn(1, H, Tq + Tm, D, generator=generator).to(dtype)
    inputs["r_w_bias"] = torch.randn(H, D, generator=generator)
    return differentiate(
        threads,
        inputs,
        causal=True,
        key_lens=torch.tensor([290, 17, 150][:B]),
        dropout_p=0.1,
        dropout_seed=torch.tensor(5),
    )


def grouped(Hk=2, groups=4, T=1100, D=24, Dp=5, r_heads=False, dtype=torch.float32):
    """Inputs of heads that share keys, with enough queries for several runs of tiles."""
    generator = torch.Generator().manual_seed(4)
    H = Hk * groups
    shapes = {
        "q": (1, H, T, D),
        "k": (1, Hk, T, D),
        "v": (1, Hk, T, D),
        "r": (1, H if r_heads else 1, 300, Dp),
        "q_pos": (1, H, T, Dp),
        "r_w_bias": (H, D),
        "r_r_bias": (H, Dp),
    }
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def documents(lengths):
    """key_start and key_lens of documents in one row."""
    ends = torch.tensor(lengths).cumsum(0)
    lengths = torch.tensor(lengths)
    starts = (ends - lengths).repeat_interleave(lengths)
    return {"key_start": starts[None], "key_lens": ends.repeat_interleave(lengths)[None]}


DOCUMENTS = [1, 300, 64, 15, 420, 257, 43]  # 1100 tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_thread_count_gives_the_same_bits_every_time(threads, dtype):
    packed = grouped(dtype=dtype)
    for run in (
        lambda: unequal_rows(threads, dtype=dtype),
        lambda: differentiate(threads, packed, causal=True, offset=299, **documents(DOCUMENTS)),
    ):
        first = run()
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def assert_close(cut, due):
    tolerance = 1e-5 * max(1.0, float(due.detach()[due.isfinite()].abs().max()))
    torch.testing.assert_close(cut.to(due.dtype), due, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 8)], ids=["B3H5", "B1H1", "B2H8"])
@pytest.mark.parametrize("threads", [2, 5, 16])
def test_work_cut_anywhere_sums_to_the_same(threads, shape):
    B, H = shape
    whole = unequal_rows(1, B=B, H=H)
    for cut, due in zip(unequal_rows(threads, B=B, H=H), whole, strict=True):
        assert_close(cut, due)


@pytest.mark.parametrize("r_heads", [False, True], ids=["one_r", "r_per_head"])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window": (130, None), "softcap": 3.0},
        {"window": (70, 40), "q_start": torch.tensor([-13])},
        {"causal": True, **documents(DOCUMENTS)},
        {"causal": True, **documents(DOCUMENTS[::-1]), "clamp": True},
        {
            "key_start": torch.randint(
                0, 1100, (1, 1100), generator=torch.Generator().manual_seed(0)
            )
        },
    ],
    ids=["causal", "window", "q_start", "documents", "documents_clamp", "no_order"],
)
def test_units_of_several_runs_agree_with_float64(options, r_heads):
    # A unit of 18 tiles and 4 heads has several runs; 3 threads cut the two units.
    inputs, options = grouped(r_heads=r_heads), {"offset": 299, "pos_scale": 0.7, **options}
    wide = {name: x.double() for name, x in inputs.items()}
    due = differentiate(1, wide, **options)
    for threads in (1, 3):
        for found, wanted in zip(differentiate(threads, inputs, **options), due, strict=True):
            assert_close(found, wanted)


def test_documents_in_one_row_equal_documents_alone():
    inputs, begin = grouped(dtype=torch.float64), 0
    out, lse, *grads = differentiate(2, inputs, causal=True, offset=299, **documents(DOCUMENTS))
    names = list(inputs)
    shared = {name: torch.zeros_like(inputs[name]) for name in ("r", "r_w_bias", "r_r_bias")}
    for length in DOCUMENTS:
        rows = slice(begin, begin + length)
        alone = {name: x if name in shared else x[:, :, rows] for name, x in inputs.items()}
        its_out, its_lse, *its_grads = differentiate(1, alone, causal=True, offset=299)
        assert_close(out[:, :, rows], its_out)
        assert_close(lse[:, :, rows], its_lse)
        for name, packed, grad in zip(names, grads, its_grads, strict=True):
            if name in shared:
                shared[name] += grad
            else:
                assert_close(packed[:, :, rows], grad)
        begin += length
    for name in shared:
        assert_close(grads[names.index(name)], shared[name])


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
