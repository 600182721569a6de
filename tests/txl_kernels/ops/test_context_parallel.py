"""Two gloo processes, each with half of the keys, give what one process gives, with gradients.

The function is the example of docs/attention.md. This file is also the script of each process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from txl_kernels import rel_attention

PAGE = Path(__file__).parents[3] / "docs" / "attention.md"
B, H, T, D = 2, 2, 12, 8  # T: tokens of a process


def example() -> str:
    section = PAGE.read_text(encoding="utf-8").split("## Context parallelism")[1]
    return section.split("```python\n")[1].split("```")[0]


@pytest.mark.slow
def test_two_processes_with_half_of_the_keys_give_the_result_of_one() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, __file__], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def process(rank: int) -> None:
    code: dict = {"__name__": "__main__"}
    exec(example().replace("dist.destroy_process_group()", ""), code)  # its own check runs first
    attend = code["context_parallel_attention"]
    own = slice(rank * T, (rank + 1) * T)
    for options in ({}, {"window": (4, None)}):
        torch.manual_seed(1)
        q, k, v, r, dout = torch.randn(5, B, H, 2 * T, D, dtype=torch.float64)
        r = r[:1]
        bias = torch.randn(2, H, D, dtype=torch.float64)
        inputs = [x.requires_grad_() for x in (q, k, v, r, bias)]
        biases = {"r_w_bias": bias[0], "r_r_bias": bias[1]}
        alone = rel_attention(q, k, v, r, causal=True, **biases, **options)
        expected = torch.autograd.grad(alone, inputs, dout)

        shards = (x[:, :, own] for x in (q, k, v))
        out = attend(*shards, r, **biases, **options)
        close(out, alone[:, :, own])
        grads = torch.autograd.grad(out, inputs, dout[:, :, own])
        for mine, due in zip(grads[:3], expected[:3], strict=True):
            close(mine[:, :, own], due[:, :, own])
        for mine, due in zip(grads[3:], expected[3:], strict=True):
            dist.all_reduce(mine)
            close(mine, due)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    torch.set_num_threads(1)
    process(int(os.environ["RANK"]))
    dist.destroy_process_group()
    # Without a teardown, in which a thread of gloo may drop a Python object of a reduction.
    os._exit(0)
