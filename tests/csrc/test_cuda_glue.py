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

from txl_kernels.backends.head_size import MAX_HEAD_SIZE

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
from txl_kernels._rel_attention_call import OptionalTensors, Options
from txl_kernels.backends.reference.rel_shift import rel_shift
from txl_kernels.ops.rel_attention_calls import prepare
from txl_kernels.testing import DECODE_CASES, check_rel_attention_output

torch.ops.load_library(sys.argv[1])
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

def on_key_cuda(operator, *args):
    return operator.default.redispatch(CUDA, *args)

def attend(q, k, v, r, **call):
    given = {name: call.pop(name) for name in OptionalTensors._fields if name in call}
    options = Options(**call, backend="reference")
    prepared = prepare("rel_attention", q, k, v, r, OptionalTensors(**given), None, options)
    return on_key_cuda(torch.ops.txl_native.rel_attention_fwd, *prepared.call.arguments())
"""
PARITY = """
for case in DECODE_CASES:
    check_rel_attention_output(case, torch.bfloat16, attend)
"""
SHIFT = """
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for n_keys, offset in ((9, 4), (40, 2), (300, 70), (0, 3)):
        x = torch.randn(2, 5, 3, 70).to(dtype).transpose(0, 2).requires_grad_()
        due = rel_shift(x, n_keys, offset)
        shifted = on_key_cuda(torch.ops.txl_native.rel_shift_fwd, x.detach(), n_keys, offset)
        assert torch.equal(shifted, due)
        dout = torch.randn(3, 5, 2, 1).to(dtype).expand(due.shape)
        dx = torch.autograd.grad(due, x, dout)[0] if n_keys else torch.zeros_like(x)
        actual = on_key_cuda(torch.ops.txl_native.rel_shift_bwd, dout, 70, offset)
        assert torch.equal(actual, dx)
"""
REFUSALS = """
def refused(error, words, dtype=torch.float32, D=8, Tq=1, **options):
    q, k, v = torch.zeros(3, 1, 1, Tq, D, dtype=dtype).unbind()
    raises(error, words, lambda: attend(q, k, v, k, **options))

def raises(error, words, call):
    try:
        call()
    except error as caught:
        assert words in str(caught), caught
    else:
        raise AssertionError(f"{words}: nothing was refused")

refused(ValueError, "up to 16 queries", Tq=17)
refused(ValueError, "head sizes must be 1 to 256", D=257)
refused(TypeError, "float64", dtype=torch.float64)
refused(RuntimeError, "does not support dropout_p", dropout_p=0.5)
q, k, v = torch.zeros(3, 0, 2, 1, 8).unbind()
empty, _ = attend(q, k, v, torch.zeros(1, 2, 3, 8))
assert empty.shape == (0, 2, 1, 8)

# Calls of the operator itself, which no public function has checked.
x, numbers = torch.zeros(2, 4, 3, 8), [1.0, 1.0, 0.0, 0.0]
absent, rules = [torch.empty(0) for _ in OptionalTensors._fields], [0, 0, 9, 9, 0, 0, 0]

def direct(error, words, q=x, k=x, v=x, r=x, **optional):
    tensors = [optional.get(name, y) for name, y in zip(OptionalTensors._fields, absent)]
    operator = torch.ops.txl_native.rel_attention_fwd
    raises(error, words, lambda: on_key_cuda(operator, q, k, v, r, tensors, rules, numbers))

direct(ValueError, "multiple of k's 3 heads", k=x[:, :3], v=x[:, :3])
direct(ValueError, "v must have shape", v=x[:, :, :2])
direct(ValueError, "q_pos must have shape", q_pos=x[..., :5])
direct(ValueError, "key_lens must have shape", key_lens=torch.zeros(2, 2, dtype=torch.int64))
direct(ValueError, "last dimension of k", k=x.mT.contiguous().mT)
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
    flags.append(f"-DTXL_MAX_HEAD_SIZE={MAX_HEAD_SIZE}")
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
