"""What reads Triton's IR finds the comparison that Triton compiles wrongly, and no other."""

from __future__ import annotations

import pytest

from txl_kernels.testing.aot import ttir

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _compares_kernel(p_out, begin, DESCENDING: tl.constexpr):
    a = tl.arange(0, 64)[:, None]
    b = tl.arange(0, 64)[None, :]
    first = 64 - a if DESCENDING else 64 + a
    tl.store(p_out + a * 64 + b, b >= begin * 64 + first)


def _ir(descending: bool) -> str:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if knobs.runtime.interpret:
        pytest.skip("a process interprets or compiles")
    signature = {"p_out": "*i1", "begin": "i32", "DESCENDING": "constexpr"}
    source = ASTSource(_compares_kernel, signature, {(2,): descending})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]


def test_a_comparison_with_a_descending_range_is_found():
    (found,) = ttir.descending_comparisons(_ir(True))
    assert "arith.cmpi sge" in found


def test_a_comparison_with_an_ascending_range_is_none():
    assert ttir.descending_comparisons(_ir(False)) == []


@pytest.mark.parametrize("name", ["arith.divsi", "arith.remsi"])
def test_a_division_is_found_through_a_broadcast(name):
    text = f"""
      %a = tt.make_range {{end = 64 : i32, start = 0 : i32}} : tensor<64xi32>
      %d = arith.subi %c, %a : tensor<64xi32>
      %e = tt.expand_dims %d {{axis = 1 : i32}} : tensor<64xi32> -> tensor<64x1xi32>
      %f = tt.broadcast %e : tensor<64x1xi32> -> tensor<64x8xi32>
      %g = {name} %f, %h : tensor<64x8xi32> loc(#loc1)
    """
    assert ttir.descending_comparisons(text) == [f"%g = {name} %f, %h : tensor<64x8xi32>"]
