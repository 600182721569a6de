"""The shapes of the adaptive ops' products: few, whatever the number of tokens.

A micro-kernel is compiled for each shape and kept for ever.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from txl_kernels import resolve

_, REASON = resolve("adaptive_nll", backend="native", device="cpu", dtype=torch.float32)
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the recorder of shapes needs g++"),
]

# Takes the place of torch's own: `gemm` looks this name up where it finds no micro-kernels.
RECORDER = """
#include <set>
#include <tuple>
static std::set<std::tuple<int, int, int, int, int, int, bool>> shapes;
extern "C" int n_shapes() { return static_cast<int>(shapes.size()); }
extern "C" void sgemm_(const char*, const char*, const int* m, const int* n, const int* k,
                       const float*, const float* a, const int* lda, const float* b, const int* ldb,
                       const float* beta, float* c, const int* ldc) {
#pragma omp critical
  shapes.insert({*m, *n, *k, *lda, *ldb, *ldc, *beta != 0});
  for (int j = 0; j < *n; ++j)
    for (int i = 0; i < *m; ++i) {
      float sum = *beta != 0 ? c[i + j * *ldc] : 0;
      for (int l = 0; l < *k; ++l) sum += a[i + l * *lda] * b[l + j * *ldb];
      c[i + j * *ldc] = sum;
    }
}
"""
CALLS = """
import ctypes, torch
from txl_kernels import adaptive_embedding, adaptive_loss, adaptive_nll
count = ctypes.CDLL(None).n_shapes
def loss(N):
    hidden = torch.randn(N, 16, requires_grad=True)
    head, tail = torch.randn(31, 16, requires_grad=True), torch.randn(101, 16, requires_grad=True)
    target = torch.randint(131, (N,))
    call = (hidden, target, head, [(None, tail, None)])
    adaptive_loss(*call, cutoffs=(30,), backend="native").backward()
    adaptive_nll(*call, cutoffs=(30,), backend="native").sum().backward()
def embedding(N):
    table, projection = (torch.randn(n, 16, requires_grad=True) for n in (5_000, 16))
    tokens = torch.randperm(5_000)[:N]
    adaptive_embedding(tokens, [table], [projection], backend="native").sum().backward()
counts = []
for lengths in (range(1, 1200, 71), range(9, 1200, 83)):
    for N in lengths:
        {op}(N)
    counts.append(count())
print(*counts)
"""


@pytest.mark.parametrize(("op", "most"), [("loss", 130), ("embedding", 40)])
def test_new_numbers_of_tokens_bring_few_new_shapes(tmp_path, op, most):
    (tmp_path / "recorder.cpp").write_text(RECORDER)
    library = tmp_path / "recorder.so"
    build = ["g++", "-O2", "-fopenmp", "-shared", "-fPIC", tmp_path / "recorder.cpp", "-o", library]
    subprocess.run(build, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-c", CALLS.replace("{op}", op)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second = map(int, run.stdout.split())
    assert 0 < first <= second <= most
