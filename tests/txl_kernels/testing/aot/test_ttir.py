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


LOOP = """
  %x = tt.load %p : tensor<64x64x!tt.ptr<bf16>, #blocked>
  %y:2 = scf.for %j = %begin to %end step %c64 iter_args(%a = %zero) -> (tensor<64x64xf32>) {
    %k = ttg.async_copy_global_to_local %p : tensor<64x64x!tt.ptr<bf16>, #blocked> -> <64x64>
    %s = ttng.warp_group_dot %q, %k, %zero : tensor<64x64xf32>
    %b = scf.if %border -> (tensor<64x64xf32>) {
      %n = tt.load %o : tensor<64x64x!tt.ptr<f32>>
      scf.yield %n : tensor<64x64xf32>
    } else {
      scf.yield %s : tensor<64x64xf32>
    }
    %h = tt.load %p_high : tensor<64x!tt.ptr<f32>, #ttg.slice<{dim = 0, parent = #mma}>>
    %w = tt.atomic_rmw fadd, relaxed, gpu, %r, %v : (tensor<64x16x!tt.ptr<f32>>, tensor<64x16xf32>)
  }
  scf.for %j = %begin to %end step %c64 {
    %z = tt.load %p : tensor<128x64x!tt.ptr<bf16>, #blocked>
  }
"""


def test_a_loop_moves_each_element_once_and_nothing_under_a_condition():
    assert ttir.loop_bytes(LOOP) == 64 * 64 * 2 + 64 * 4 + 64 * 16 * 4


def test_a_kernel_without_products_in_a_loop_moves_nothing_in_one():
    assert ttir.loop_bytes(LOOP.replace("dot", "copy")) == 0
