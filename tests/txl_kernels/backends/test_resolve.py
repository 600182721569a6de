"""resolve: only "auto" chooses; a named backend runs or says why not, in one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from txl_kernels import resolve
from txl_kernels.backends import OPS, native


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_auto_always_finds_a_backend(op, device):
    chosen, reason = resolve(op, device=device, dtype=torch.float32, needs_grad=True)
    assert chosen is not None
    assert reason is None


@pytest.mark.parametrize("op", OPS)
def test_a_named_backend_is_never_replaced(op):
    for name in ("reference", "native", "triton"):
        chosen, reason = resolve(op, backend=name, device="cpu", dtype=torch.float32)
        assert chosen in (name, None)
        assert (chosen is None) == (reason is not None)


def test_the_reason_is_the_native_door_s_own(monkeypatch):
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was there")
    call = {"device": "cpu", "dtype": torch.float32}
    assert resolve("rel_attention", backend="native", **call) == (None, "no compiler was there")
    assert resolve("rel_attention", **call).backend == "reference"


def test_a_device_without_a_kernel_is_said_before_anything_runs(require_backend):
    require_backend("rel_attention", "native")
    call = {"backend": "native", "device": "xpu", "dtype": torch.float32}
    assert "no XPU kernel for rel_attention" in resolve("rel_attention", **call).reason


def test_head_sizes_beyond_256_are_not_native(require_backend):
    require_backend("rel_attention", "native")
    call = {"device": "cpu", "dtype": torch.float32}
    assert resolve("rel_attention", **call, D=256).backend == "native"
    assert resolve("rel_attention", **call, D=257).backend == "reference"
    assert "257" in resolve("rel_attention", **call, backend="native", D=64, Dv=257).reason


def test_an_op_that_a_backend_lacks_is_named():
    call = {"device": "cpu", "dtype": torch.float32, "backend": "native"}
    reason = resolve("adaptive_topk", **call).reason
    assert reason == "this package has no native backend for adaptive_topk"


@pytest.mark.parametrize(("op", "backend"), [("attention", "auto"), ("rel_shift", "fastest")])
def test_unknown_names_raise(op, backend):
    with pytest.raises(ValueError, match="must be one of"):
        resolve(op, backend=backend, device="cpu", dtype=torch.float32)


def test_importing_the_package_imports_no_triton_and_no_kernel():
    code = (
        "import sys, txl_kernels; "
        "assert 'triton' not in sys.modules and 'txl_kernels._C' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
