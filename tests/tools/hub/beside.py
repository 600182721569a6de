"""Loads two variants of the kernel beside txl_kernels, and runs the Triton operators of all three.

Argument: the folder of the kernel. Needs Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from loader import formula, inputs, load_variant, outputs_and_gradients

import txl_kernels

root = Path(sys.argv[1])
packages = [
    txl_kernels,
    *(load_variant(root / "build" / f"torch-{backend}") for backend in ("cpu", "cuda")),
]
tensors = inputs(torch.float32, B=1, H=1)
expected = outputs_and_gradients(formula, tensors)
nodes = []
for package in packages:
    actual = outputs_and_gradients(package.rel_attention, tensors, causal=True, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    nodes.append(actual[0].grad_fn.name())
print(json.dumps({"names": [package.__name__ for package in packages], "nodes": nodes}))
