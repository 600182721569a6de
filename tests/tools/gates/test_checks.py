"""Each check of a compiled launch finds a planted fault, and sound launches pass."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from tools.gates import checks, sass, spills
from tools.gates.compiling import Binary
from tools.gates.spills import Spill
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


def launch(arch=120, dtype="bf16", D=64, kernel="_rel_attention_fwd_kernel"):
    return Launch(
        kernel=SimpleNamespace(__name__=kernel, arg_names=["p_q", "D"]),
        signature={"p_q": (f"*{dtype}",), "D": "constexpr"},
        constants={(1,): D},
        attributes={},
        options=None,
        target=SimpleNamespace(arch=arch),
    )


def found(binary=SOUND, accepted_spill=0, **options):
    return checks.failures(launch(**options), binary, accepted_spill)


def changed(ir=None, **code):
    parts = {} if ir is None else {"ttir": ir, "ttgir": ir}
    return dataclasses.replace(SOUND, code=dataclasses.replace(CODE, **code), **parts)


def test_sound_launches_pass():
    assert found() == []
    assert found(changed(opcodes={"FFMA": 8}), dtype="fp32") == []
    assert found(changed(ir="tt.load", opcodes={"LDG": 1})) == []  # no products


@pytest.mark.parametrize(
    ("binary", "options", "expected"),
    [
        (dataclasses.replace(SOUND, shared=101_377), {}, "101377 bytes of shared memory"),
        (dataclasses.replace(SOUND, shared=101_377), {"arch": 80}, None),
        (dataclasses.replace(SOUND, tensor_memory=513), {"arch": 100}, "513 columns of tensor"),
        (changed(opcodes={"FFMA": 8}), {}, "no tensor-core instruction"),
        (changed(ir=DOT.replace("#mma", "#blocked1")), {}, "1 of the 16-bit products do not"),
        (changed(), {"dtype": "fp32"}, "float32 products on tensor cores (HMMA)"),
        (changed(opcodes={"UTCHMMA": 8}), {"dtype": "fp32", "arch": 100}, "(UTCHMMA)"),
        (changed(ir=DOT + DESCENDING), {}, "wrongly: %g = arith.cmpi sge, %f, %h"),
        (changed(stack=8), {}, "8 bytes per thread are spilled, the limit is 0"),
        (changed(stack=512), {"D": 128}, None),
        (changed(stack=520), {"D": 128}, "520 bytes per thread are spilled, the limit is 512"),
        (changed(stack=512), {"kernel": "_rel_attention_bwd_dqdr_kernel"}, None),
        (changed(stack=600), {"D": 128, "accepted_spill": 600}, None),
    ],
)
def test_planted_faults_are_found(binary, options, expected):
    failures = found(binary, **options)
    assert len(failures) == (expected is not None)
    assert expected is None or expected in failures[0]


def test_exceptions_hold_for_their_launches_alone(monkeypatch):
    entry = Spill("op/*/dqdr", 90, 600, "a reason", versions=("3.6.0",))
    monkeypatch.setattr(spills, "SPILLS", (entry,))
    assert spills.accepted("op/bfloat16/dqdr", 90, "3.6.0") == 600
    assert spills.accepted("op/bfloat16/dqdr", 80, "3.6.0") == 0
    assert spills.accepted("op/bfloat16/dkdv", 90, "3.6.0") == 0
    assert spills.accepted("op/bfloat16/dqdr", 90, "3.9.0") == 0


def test_an_exception_that_no_launch_needs_is_found(monkeypatch):
    monkeypatch.setattr(spills, "SPILLS", (Spill("op/*/dqdr", 90, 600, "a reason", ("3.6.0",)),))
    assert spills.unneeded({("op/bfloat16/dqdr", 90): (513, 512)}, "3.6.0") == []
    (unneeded,) = spills.unneeded({("op/bfloat16/dqdr", 90): (512, 512)}, "3.6.0")
    assert "op/*/dqdr on sm_90" in unneeded
    assert spills.unneeded({("op/bfloat16/dqdr", 80): (0, 512)}, "3.6.0") == []
    assert spills.unneeded({("op/bfloat16/dqdr", 90): (0, 512)}, "3.9.0") == []


def test_every_exception_has_a_reason():
    assert all(entry.why and entry.arch in checks.SHARED_LIMIT for entry in spills.SPILLS)
