"""The ATen bindings of the CUDA kernels, on CPU tensors and with the emulated kernels.

Tensors, strides and options must become the right pointers and numbers, and some are refused.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TORCH = Path(torch.__file__).parent
# Replaces the only header that needs a device: a CPU tensor's stream has no handle.
DEVICE_CALL = """
#pragma once
#include <ATen/core/Tensor.h>
namespace txl {
struct DeviceCall {
  explicit DeviceCall(const at::Tensor&) {}
  void* stream() const { return nullptr; }
  static void check(const char* op, const char* error) { TORCH_CHECK(!error, op, ": ", error); }
};
}  // namespace txl
"""
# Dispatches CPU tensors to the key CUDA. In a separate process, because it registers kernels.
USE = """
import sys, torch
from txl_kernels import rel_attention, rel_attention_with_lse
from txl_kernels.backends.reference.rel_shift import rel_shift
from txl_kernels.ops import rel_attention as op
from txl_kernels.testing import DECODE_CASES, check_rel_attention_output

torch.ops.load_library(sys.argv[1])
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

class OnKeyCuda:
    def __getattr__(self, name):
        operator = getattr(torch.ops.txl_native, name).default
        return lambda *args, **options: operator.redispatch(CUDA, *args, **options)

op.operators = lambda backend: OnKeyCuda()
op.choose = lambda op, *tensors, backend, **call: "reference" if backend == "reference" else backend
"""
PARITY = """
for case in DECODE_CASES:
    check_rel_attention_output(
        case,
        torch.bfloat16,
        lambda **call: rel_attention_with_lse(**call, backend="native"),
    )
"""
SHIFT = """
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for n_keys, offset in ((9, 4), (40, 2), (300, 70), (0, 3)):
        x = torch.randn(2, 5, 3, 70).to(dtype).transpose(0, 2).requires_grad_()
        due = rel_shift(x, n_keys, offset)
        assert torch.equal(OnKeyCuda().rel_shift_fwd(x.detach(), n_keys, offset), due)
        dout = torch.randn(3, 5, 2, 1).to(dtype).expand(due.shape)
        dx = torch.autograd.grad(due, x, dout)[0] if n_keys else torch.zeros_like(x)
        assert torch.equal(OnKeyCuda().rel_shift_bwd(dout, 70, offset), dx)
"""
REFUSALS = """
def refused(error, words, dtype=torch.float32, D=8, Tq=1, **options):
    q, k, v = torch.zeros(3, 1, 1, Tq, D, dtype=dtype).unbind()
    try:
        rel_attention(q, k, v, k, backend="native", **options)
    except error as caught:
        assert words in str(caught), caught
    else:
        raise AssertionError(f"{words}: nothing was refused")

refused(ValueError, "up to 16 queries", Tq=17)
refused(ValueError, "head sizes up to 256", D=257)
refused(TypeError, "float64", dtype=torch.float64)
for option in ({"dropout_p": 0.5}, {"dead_rows": "uniform"}, {"bias": torch.zeros(1, 1)}):
    refused(RuntimeError, "takes none of", **option)
q, k, v = torch.zeros(3, 0, 2, 1, 8).unbind()
empty = rel_attention(q, k, v, torch.zeros(1, 2, 3, 8), backend="native")
assert empty.shape == (0, 2, 1, 8)
"""

pytestmark = [
    pytest.mark.slow_build,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++"),
]


@pytest.fixture(scope="module")
def library(build_once) -> Path:
    return build_once("glue", compile_glue) / "libglue.so"


def compile_glue(folder: Path) -> None:
    csrc = Path(__file__).parents[2] / "csrc"
    shutil.copytree(csrc / "ops", folder / "ops")
    (folder / "ops" / "device_call.h").write_text(DEVICE_CALL)
    sources = sorted((folder / "ops").glob("*_cuda.cpp"))
    (folder / "glue.cpp").write_text(
        # The replaced header is compiled too, under another name.
        "#define DeviceCall RealDeviceCall\n"
        f'#include "{csrc}/ops/device_call.h"\n'
        "#undef DeviceCall\n" + "".join(f'#include "{path}"\n' for path in sources)
    )
    flags = ["-std=c++20", "-O1", "-fPIC", "-pthread", "-mf16c", "-fno-strict-aliasing"]
    compiler = ["g++", *flags, "-D_GLIBCXX_USE_CXX11_ABI=1", f"-I{csrc / 'include'}"]
    emulation = ["-Wno-unknown-pragmas", f"-I{Path(__file__).parent / 'cuda_emulation'}"]
    subprocess.run(
        [*compiler, "-isystem", TORCH / "include", "-c", "glue.cpp"], cwd=folder, check=True
    )
    kernels = sorted((csrc / "cuda").glob("*.cu"))
    subprocess.run([*compiler, *emulation, "-x", "c++", "-c", *kernels], cwd=folder, check=True)
    libraries = [TORCH / "lib" / name for name in ("libtorch_cpu.so", "libc10.so")]
    objects = sorted(folder.glob("*.o"))
    command = ["g++", "-shared", "-pthread", "-Wl,--no-undefined", *objects, *libraries]
    subprocess.run([*command, "-o", "libglue.so"], cwd=folder, check=True)


@pytest.mark.parametrize(
    "script", [PARITY, SHIFT, REFUSALS], ids=["attention", "shift", "refusals"]
)
def test_glue(script, library):
    command = [sys.executable, "-c", USE + script, library]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
