"""The Triton backend's door: what it says where Triton cannot run, and that nothing runs then."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from txl_kernels import BackendUnavailableError, rel_shift, resolve
from txl_kernels.backends import triton

X = torch.zeros(3, 4)


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def _compiles() -> bool:
    return triton.unavailable_reason("cpu") is not None


def test_a_blocked_triton_is_one_sentence():
    _run(
        "import sys; sys.modules['triton'] = None; import torch, txl_kernels; "
        "call = dict(backend='triton', device='cuda', dtype=torch.float32); "
        "name, reason = txl_kernels.resolve('rel_shift', **call); "
        "assert name is None and 'Triton is not installed' in reason, reason; "
        "assert txl_kernels.rel_shift(torch.zeros(3, 4)).shape == (3, 4)"
    )


@pytest.mark.skipif(not _compiles(), reason="Triton interprets here")
def test_a_cpu_tensor_needs_the_interpreter():
    with pytest.raises(BackendUnavailableError, match=r"TRITON_INTERPRET=1|not installed"):
        rel_shift(X, backend="triton")
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1|not installed"):
        torch.ops.txl_triton.rel_shift_fwd(X, 4, 2)


def test_auto_never_takes_triton_on_a_cpu():
    for op in ("rel_attention", "rel_shift"):
        chosen, _ = resolve(op, device="cpu", dtype=torch.float32)
        assert chosen in ("native", "reference")


def test_other_devices_are_named():
    call = {"backend": "triton", "dtype": torch.float32}
    assert "not on xpu" in str(resolve("rel_shift", device="xpu", **call).reason) or _no_triton()


def _no_triton() -> bool:
    return "not installed" in str(triton.unavailable_reason("xpu"))


@pytest.mark.interpreted
def test_bfloat16_is_refused_while_interpreting():
    if _compiles():
        pytest.skip(str(triton.unavailable_reason("cpu")))
    _, reason = resolve("rel_shift", backend="triton", device="cpu", dtype=torch.bfloat16)
    assert "bfloat16" in str(reason)


@pytest.mark.interpreted
@pytest.mark.parametrize("argument", ["bias", "dead_rows='uniform'"])
def test_what_is_not_served_is_named(argument):
    if _compiles():
        pytest.skip(str(triton.unavailable_reason("cpu")))
    call = {"backend": "triton", "device": "cpu", "dtype": torch.float32, "uses": [argument]}
    assert resolve("rel_attention", **call).reason == f"triton does not support {argument} yet"
