"""Each check of a compiled launch finds a planted fault, and sound launches pass."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from tools.gates import checks, sass, spills
from tools.gates.compiling import Binary
from txl_kernels.backends.triton.launching import Launch

CODE = sass.Code(registers=128, stack=0, shared=0, opcodes={"HMMA": 8, "LDS": 2})
DOT = "%a = tt.dot %b, %c, %d : tensor<64x64xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma}>>"
SOUND = Binary(CODE, shared=98_304, tensor_memory=0, ttir=DOT, ttgir=DOT)
DESCENDING = """
  %a = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
  %d = arith.subi %c, %a : tensor<64xi32>
  %e = tt.expand_dims %d {axis = 1 : i32} : tensor<64xi32> -> tensor<64x1xi32>
  %f = tt.broadcast %e : tensor<64x1xi32> -> tensor<64x8xi32>
  %g = arith.cmpi sge, %f, %h : tensor<64x8xi32> loc(#loc1)
"""


def found(binary=SOUND, arch=120, dtype="bf16", D=64, kernel="_rel_attention_fwd_kernel"):
    launch = Launch(
        kernel=SimpleNamespace(__name__=kernel),
        signature={"p_q": (f"*{dtype}",), "D": "constexpr"},
        constants={},
        attributes={},
        options=None,
        target=SimpleNamespace(arch=arch),
        arguments={"D": D},
    )
    return checks.failures(launch, binary, checks.spill_limit(launch))


def changed(ir=DOT, **code):
    return dataclasses.replace(SOUND, code=dataclasses.replace(CODE, **code), ttir=ir, ttgir=ir)


@pytest.mark.parametrize(
    ("binary", "options"),
    [
        (SOUND, {}),
        (dataclasses.replace(SOUND, shared=166_912), {"arch": 80}),
        (changed(opcodes={"FFMA": 8}), {"dtype": "fp32"}),
        (changed(ir="tt.load", opcodes={"LDG": 1}), {}),
        (changed(stack=512), {"D": 128}),
        (changed(stack=512), {"kernel": "_rel_attention_bwd_dqdr_kernel"}),
    ],
)
def test_sound_launches_pass(binary, options):
    assert found(binary, **options) == []


@pytest.mark.parametrize(
    ("binary", "options", "expected"),
    [
        (dataclasses.replace(SOUND, shared=101_377), {}, "101377 bytes of shared memory"),
        (dataclasses.replace(SOUND, tensor_memory=513), {"arch": 100}, "513 columns of tensor"),
        (changed(opcodes={"FFMA": 8}), {}, "no tensor-core instruction"),
        (changed(ir=DOT.replace("#mma", "#blocked1")), {}, "1 of the 16-bit products do not"),
        (changed(), {"dtype": "fp32"}, "float32 products on tensor cores (HMMA)"),
        (changed(opcodes={"UTCHMMA": 8}), {"dtype": "fp32", "arch": 100}, "(UTCHMMA)"),
        (changed(ir=DOT + DESCENDING), {}, "wrongly: %g = arith.cmpi sge, %f, %h"),
        (changed(stack=8), {}, "8 bytes per thread are spilled, the limit is 0"),
        (changed(stack=520), {"D": 128}, "520 bytes per thread are spilled, the limit is 512"),
    ],
)
def test_planted_faults_are_found(binary, options, expected):
    (failure,) = found(binary, **options)
    assert expected in failure


def test_exceptions_hold_for_their_launches_alone(monkeypatch):
    entry = spills.Spill("op/.*/dqdr", (80, 90), 600, "a reason", versions=("3.6.0",))
    monkeypatch.setattr(spills, "SPILLS", (entry,))
    assert spills.find("op/bfloat16/dqdr", 90, "3.6.0") == entry
    for name, arch, version in (("dqdr", 86, "3.6.0"), ("dk", 90, "3.6.0"), ("dqdr", 90, "3.9.0")):
        assert spills.find(f"op/bfloat16/{name}", arch, version) is None
    assert spills.unneeded({(entry, 80), (entry, 90)}, [80, 86, 90], "3.6.0") == []
    assert spills.unneeded(set(), [86], "3.6.0") == spills.unneeded(set(), [90], "3.9.0") == []
    (unneeded,) = spills.unneeded({(entry, 80)}, [80, 90], "3.6.0")
    assert "op/.*/dqdr on sm_90" in unneeded
