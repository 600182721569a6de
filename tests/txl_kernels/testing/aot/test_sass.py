"""Loops, steady paths, opcodes and products are read from what cuobjdump prints."""

from __future__ import annotations

import dataclasses

import pytest

from txl_kernels.testing.aot import sass

PRINTED = """
 Function _kernel:
  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
	code for sm_90
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x1 */
        /*0010*/              @!P0 BRA 0x30 ;                            /* 0x1 */
        /*0020*/                   FADD R1, R2, R3 ;                     /* 0x1 */
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x1 */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/                   BRA P1, 0x90 ;                        /* 0x1 */
        /*0070*/                   ISETP.GE.AND P2, PT, R1, R2, PT ;     /* 0x1 */
        /*0080*/                   FSEL R1, R1, -INF, P2 ;               /* 0x1 */
        /*0090*/                   MUFU.EX2 R5, R6 ;                     /* 0x1 */
        /*00a0*/               @P3 BRA 0x30 ;                            /* 0x1 */
        /*00b0*/                   FADD R1, R2, R3 ;                     /* 0x1 */
        /*00c0*/               @P4 BRA 0xb0 ;                            /* 0x1 */
        /*00d0*/               @P5 BRA 0x20 ;                            /* 0x1 */
        /*00e0*/                   EXIT ;                                /* 0x1 */
        /*00f0*/                   BRA 0xf0;                             /* 0x1 */
"""


@pytest.fixture
def code():
    return sass.parse(PRINTED)


def test_resources_are_read(code):
    assert (code.registers, code.stack, code.static_shared) == (40, 8, 1024)
    assert len(code.instructions) == 16


def test_innermost_loops_are_those_that_hold_no_other(code):
    assert [(loop[0].address, loop[-1].address) for loop in code.loops()] == [
        (0x30, 0xA0),
        (0xB0, 0xC0),
    ]


def test_the_main_loop_is_the_one_with_the_products(code):
    assert code.main_loop()[0].address == 0x30
    assert sass.count(code.main_loop())["HMMA"] == 1


def test_without_a_loop_the_whole_kernel_counts(code):
    straight = sass.Code(code.instructions[:4], 40, 0, 0)
    assert straight.main_loop() == straight.instructions


def test_products_outside_of_every_loop_make_the_whole_kernel_one_pass(code):
    moved = sass.Code((*code.instructions[3:6], *code.instructions[11:]), 40, 0, 0)
    assert [loop[0].opcode for loop in moved.loops()] == ["FADD"]
    assert moved.main_loop() == moved.instructions


def test_kernels_of_a_file_are_told_apart():
    resources, body = PRINTED.split("\tcode for sm_90\n")
    other = resources.replace("_kernel", "_other").replace("REG:40", "REG:72")
    one, two = (f"\t\tFunction : {name}\n{body}" for name in ("_kernel", "_other"))
    found = sass.parse_all(f"{resources}{other}\tcode for sm_90\n{one}{two}")
    assert {name: code.registers for name, code in found.items()} == {"_kernel": 40, "_other": 72}
    assert found["_kernel"] == sass.parse(PRINTED)


def test_code_for_border_tiles_is_not_on_the_steady_path(code):
    left_out = set(code.main_loop()) - set(sass.steady(code.main_loop()))
    assert [i.address for i in sorted(left_out, key=lambda i: i.address)] == [0x70, 0x80]


def test_products_are_never_left_out_of_the_steady_path(code):
    jump = sass.Instruction(0x30, "BRA", "P0, 0x60")
    loop = (jump, *code.main_loop()[1:])
    assert sum(i.tile is not None for i in sass.steady(loop)) == 2


def test_atomic_additions_are_never_left_out_of_the_steady_path(code):
    loop = tuple(
        dataclasses.replace(i, opcode="REDG.E.ADD.F32x4") if i.address == 0x80 else i
        for i in code.main_loop()
    )
    assert sass.steady(loop) == loop


def test_flop_of_products(code):
    by_four_warps = 2 * 64 * 64 * 16
    by_a_warp = 2 * 16 * 8 * 16
    loop = code.main_loop()
    assert sass.tensor_flop(loop, num_warps=4) == by_four_warps + 4 * by_a_warp
    assert sass.tensor_flop(loop, num_warps=8) == 2 * by_four_warps + 8 * by_a_warp


@pytest.mark.parametrize(
    ("opcode", "tile"),
    [
        ("HGMMA.64x128x8.F32.TF32", (64, 128, 8)),
        ("HMMA.1688.F32.TF32", (16, 8, 8)),
        ("HMMA.16816.F32.BF16", (16, 8, 16)),
        ("FFMA", None),
    ],
)
def test_shapes_of_products(opcode, tile):
    assert sass.Instruction(0, opcode, "").tile == tile


def test_what_is_no_kernel_is_an_error():
    with pytest.raises(ValueError, match="printed no kernel"):
        sass.parse("cuobjdump fatal")
