"""Small kernels for the tests of the ahead-of-time tools, and how to compile them."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _flash_kernel(
    p_q, p_k, p_v, p_out, s_bh, Tk, scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Attention without positions or masks: the yardstick whose speed has been published."""
    o_i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d, o_j = tl.arange(0, D), tl.arange(0, BLOCK_K)
    base = tl.program_id(1).to(tl.int64) * s_bh
    b_q = tl.load(p_q + base + o_i[:, None] * D + o_d)
    b_out = tl.zeros([BLOCK_Q, D], tl.float32)
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    for begin in tl.range(0, Tk, BLOCK_K):
        b_k = tl.load(p_k + base + (begin + o_j)[:, None] * D + o_d)
        b_v = tl.load(p_v + base + (begin + o_j)[:, None] * D + o_d)
        b_scores = tl.dot(b_q, tl.trans(b_k)) * scale
        new_max = tl.maximum(b_max, tl.max(b_scores, 1))
        b_probs = tl.exp2(b_scores - new_max[:, None])
        shrink = tl.exp2(b_max - new_max)
        b_sum = b_sum * shrink + tl.sum(b_probs, 1)
        b_out = tl.dot(b_probs.to(b_v.dtype), b_v, b_out * shrink[:, None])
        b_max = new_max
    b_out = (b_out / b_sum[:, None]).to(b_q.dtype)
    tl.store(p_out + base + o_i[:, None] * D + o_d, b_out)


@triton.jit
def _product_kernel(
    p_a, p_b, p_out, n, N: tl.constexpr, PRECISION: tl.constexpr, GATHER: tl.constexpr
):
    """Sum of products of N × N tiles, with a gather along the rows of each if asked for."""
    o_row, o_column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    o_tile = o_row * N + o_column
    b_sum = tl.zeros([N, N], tl.float32)
    for i in tl.range(0, n):
        b_a, b_b = tl.load(p_a + i * N * N + o_tile), tl.load(p_b + i * N * N + o_tile)
        b_product = tl.dot(b_a, b_b, input_precision=PRECISION)
        if GATHER:
            b_product = tl.gather(b_product, (o_column + o_row) % N, 1)
        b_sum += b_product
    tl.store(p_out + o_tile, b_sum)


@triton.jit
def _copy_kernel(p_x, p_out, n, s_x, BLOCK: tl.constexpr):
    """out[i] = x[i · s_x]."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_x + o * s_x, mask=o < n), mask=o < n)


@pytest.fixture(autouse=True)
def compiling():
    """Skips where this process interprets kernels: it cannot compile them."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: a process interprets or compiles")


@pytest.fixture
def launch_flash():
    """Launches attention over `T` keys and queries on 16 heads."""

    def launch(D: int, block_q: int, block_k: int, T: int = 16384, **options: int) -> None:
        x = torch.empty(1, 16, T, D, dtype=torch.bfloat16, device="meta")
        _flash_kernel[(T // block_q, 16)](
            x, x, x, x, T * D, T, 0.1, D=D, BLOCK_Q=block_q, BLOCK_K=block_k, **options
        )

    return launch


@pytest.fixture
def launch_product():
    """Launches a sum of products of N × N tiles."""

    def launch(
        N: int, dtype: torch.dtype, precision: str = "ieee", gather: bool = False, **options: int
    ) -> None:
        x = torch.empty(8, N, N, dtype=dtype, device="meta")
        out = torch.empty(N, N, device="meta")
        _product_kernel[(1,)](x, x, out, 8, N=N, PRECISION=precision, GATHER=gather, **options)

    return launch


@pytest.fixture
def launch_copy():
    """Launches a strided copy of n elements."""

    def launch(n: int, stride: int, x: torch.Tensor | None = None) -> None:
        if x is None:
            x = torch.empty(n * stride, device="meta")
        _copy_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](
            x, torch.empty(n, device="meta"), n, stride, BLOCK=128
        )

    return launch
