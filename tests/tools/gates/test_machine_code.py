"""Machine code and IR are read correctly: from text, and from one small compiled kernel."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.backends import triton as package

if package.interprets() or not package._is_installed():
    pytest.skip("a process interprets or compiles", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from tools.gates import checks, sass
from tools.gates.compiling import compile_launch
from txl_kernels.backends.triton.launching import launch, recording

PRINTED = """
Resource usage:
 Common:
  GLOBAL:0
 Function _kernel:
  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:600
 Function _other:
  REG:72 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:600
\tcode for sm_90
\t\tFunction : _kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x1 */
        /*0010*/              @!P0 BRA 0x30 ;                            /* 0x1 */
        /*0020*/             @!UP0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   LDC.64 R4, c[0x0][0x30] ;             /* 0x1 */
\t\tFunction : _other
        /*0000*/                   EXIT ;                                /* 0x1 */
"""


@triton.jit
def _product_kernel(
    p_x, p_out, n, N: tl.constexpr, PRECISION: tl.constexpr, DESCENDS: tl.constexpr
):
    o_row, o_column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    b_sum = tl.zeros([N, N], tl.float32)
    for i in tl.range(0, n):
        b_x = tl.load(p_x + i * N * N + o_row * N + o_column)
        b_sum = tl.dot(b_x, b_x, b_sum, input_precision=PRECISION)
    first = N - o_row if DESCENDS else N + o_row
    tl.store(p_out + o_row * N + o_column, b_sum, mask=o_column >= n * N + first)


def compiled(arch, dtype, precision="ieee", descends=False):
    """The launch of a sum of products, and its binary."""
    x, out = torch.empty(64, 64, dtype=dtype, device="meta"), torch.empty(64, 64, device="meta")
    with recording(GPUTarget("cuda", arch, 32)) as launches:
        launch(_product_kernel, (1,), x, out, 8, N=64, PRECISION=precision, DESCENDS=descends)
    return launches[0], compile_launch(launches[0])


def test_resources_and_opcodes_are_read():
    assert sass.parse(PRINTED) == {
        ("sm_90", "_kernel"): sass.Code(40, 8, 1024, {"LDC": 2, "BRA": 1, "HGMMA": 1}),
        ("sm_90", "_other"): sass.Code(72, 0, 0, {"EXIT": 1}),
    }


@pytest.mark.parametrize(
    "text", ["cuobjdump fatal", PRINTED.replace("EXIT", ""), PRINTED.replace("SHARED", "")]
)
def test_other_output_is_an_error(text):
    with pytest.raises(ValueError, match="cuobjdump printed no"):
        sass.parse(text)


@pytest.mark.parametrize(
    ("arch", "opcode"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (120, "HMMA")]
)
def test_products_use_the_tensor_cores_of_the_architecture(arch, opcode):
    launched, binary = compiled(arch, torch.bfloat16)
    assert binary.code.tensor_opcodes == [opcode]
    assert binary.code.registers > 0
    assert binary.shared > 0
    assert (binary.tensor_memory > 0) == (arch == 100)
    assert checks.failures(launched, binary, 0) == []


def test_float32_products_are_exact_unless_planted_otherwise():
    assert checks.failures(*compiled(80, torch.float32), 0) == []
    (failure,) = checks.failures(*compiled(80, torch.float32, "tf32"), 0)
    assert failure == "float32 products on tensor cores (HMMA)"


def test_a_comparison_with_a_descending_range_is_found():
    (failure,) = checks.failures(*compiled(80, torch.bfloat16, descends=True), 0)
    assert "wrongly" in failure
    assert "arith.cmpi sge" in failure
