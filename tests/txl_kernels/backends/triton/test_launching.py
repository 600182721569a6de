"""launching: every launch goes through one function, and a hash names the compiled kernel."""

from __future__ import annotations

import ast
from pathlib import Path
from unittest import mock

import pytest
import torch

from txl_kernels._rel_attention_call import Numbers, OptionalTensors, RelAttentionCall, Rules
from txl_kernels.backends import triton as package

pytest.importorskip("triton", exc_type=ImportError)
launch_table = pytest.importorskip("txl_kernels.backends.triton.launch_table", exc_type=ImportError)
launching = pytest.importorskip("txl_kernels.backends.triton.launching", exc_type=ImportError)
if package.interprets():
    pytest.skip("a process interprets or compiles", allow_module_level=True)


def hashes(capability=(9, 0), D=64, storage_offset=0, rules=None, numbers=None):
    from triton.backends.compiler import GPUTarget

    from txl_kernels.backends.triton.rel_attention import rel_attention_fwd

    arch = capability[0] * 10 + capability[1]
    limits = mock.patch.object(launch_table, "device_limits", return_value=(capability, 232448))
    with launching.recording(GPUTarget("cuda", arch, 32)) as launches, limits:
        x = torch.empty(2 * 3 * 40 * D + storage_offset, dtype=torch.bfloat16, device="meta")
        q = x[storage_offset:].view(2, 3, 40, D)
        call = RelAttentionCall(
            *(q, q, q, q[:1]),
            OptionalTensors(),
            Rules(**{"offset": 39, "window_right": 0, **(rules or {})}),
            Numbers(**{"scale": 0.1, "pos_scale": 0.1, **(numbers or {})}),
        )
        rel_attention_fwd(*call.arguments())
    return [launching.kernel_hash(launch) for launch in launches]


def test_a_hash_is_the_same_for_the_same_kernel():
    assert hashes() == hashes()
    # Numbers that are not compiled in.
    assert hashes() == hashes(rules={"window_left": 30}, numbers={"scale": 0.5})


@pytest.mark.parametrize(
    "other",
    [
        *({"D": 72}, {"storage_offset": 1}, {"capability": (8, 0)}),
        *({"rules": {"clamp": 1}}, {"numbers": {"softcap": 1.0}}),
        {"rules": {"offset": 3}},  # some keys have no row of r
    ],
    ids=str,
)
def test_another_specialisation_has_another_hash(other):
    assert hashes(**other) != hashes()


def test_the_source_and_the_version_of_triton_count(monkeypatch):
    import triton

    from txl_kernels.backends.triton.rel_attention_fwd import _rel_attention_fwd_kernel

    plain = hashes()
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.5.0")
        assert hashes() != plain
    monkeypatch.setattr(_rel_attention_fwd_kernel, "hash", "another source")
    assert hashes() != plain


def test_every_launch_goes_through_launch():
    for path in Path(package.__file__).parent.glob("*.py"):
        if path.name == "launching.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                called = ast.unparse(node.func.value)
                assert not called.endswith("_kernel"), f"{path.name}:{node.lineno} {called}"
