"""resolve: only "auto" chooses; a named backend runs or says why not, in one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from txl_kernels import backends, resolve
from txl_kernels.backends import OPS, cuda_device, native, triton

cuda_device_reason = cuda_device.unavailable_reason


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_auto_always_finds_a_backend(op, device):
    chosen, reason = resolve(op, device=device, dtype=torch.float32, needs_grad=True)
    assert chosen is not None
    assert (reason is None) == (chosen != "reference")


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
    assert resolve("rel_attention", **call) == ("reference", "no compiler was there")


def test_the_reference_is_explained_by_every_backend_before_it(cuda_kernels):
    call = {"device": "cuda", "dtype": torch.float32, "Tq": 17, "uses": ["bias"]}
    reason = resolve("rel_attention", **call).reason
    for backend in ("native", "triton"):
        assert resolve("rel_attention", **call, backend=backend).reason in reason


def test_a_device_without_kernels_is_named():
    reason = resolve("rel_attention", device="xpu", dtype=torch.float32).reason
    assert reason == "the kernels run on cpu and cuda devices, not on xpu"


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


@pytest.fixture
def cuda_kernels(monkeypatch):
    """As if the native library had been built with CUDA, for a device that is there."""
    monkeypatch.setattr(native, "unavailable_reason", lambda: None)
    monkeypatch.setattr(cuda_device, "unavailable_reason", lambda: None)
    monkeypatch.setattr(backends, "_has_kernel", lambda operator, device_type: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("Tq", [1, 16])
@pytest.mark.parametrize("D", [1, 41, 256])
def test_decoding_on_cuda_is_native(cuda_kernels, dtype, Tq, D):
    assert resolve("rel_attention", device="cuda", dtype=dtype, Tq=Tq, D=D).backend == "native"


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"Tq": 17}, "up to 16 queries on cuda, not 17"),
        ({"needs_grad": True}, "no gradients on cuda"),
        ({"dtype": torch.float64}, "float64"),
        ({"D": 257}, "up to 256, not 257"),
        ({"Dp": 257}, "up to 256, not 257"),
        ({"uses": ["dropout_p"]}, "dropout_p"),
        ({"uses": ["bias"]}, "bias"),
        ({"uses": ["dead_rows='uniform'"]}, "dead_rows='uniform'"),
    ],
)
def test_what_decoding_kernels_lack_is_named_and_left_to_others(cuda_kernels, call, named):
    call = {"device": "cuda", "dtype": torch.float32, **call}
    chosen, reason = resolve("rel_attention", backend="native", **call)
    assert chosen is None
    assert named in reason
    assert resolve("rel_attention", **call).backend != "native"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_shift_on_cuda_is_native_with_gradients(cuda_kernels, dtype):
    chosen = resolve("rel_shift", device="cuda", dtype=dtype, Tq=4096, needs_grad=True)
    assert chosen.backend == "native"


def test_a_library_without_cuda_says_why(require_backend):
    require_backend("rel_attention", "native")
    cuda = native.build_info()["cuda"]
    if cuda["built"]:
        pytest.skip("the native library here was built with CUDA")
    call = {"backend": "native", "device": "cuda", "dtype": torch.float32}
    assert cuda["reason"] in resolve("rel_attention", **call).reason


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
        "import sys, torch, txl_kernels; "
        "assert 'triton' not in sys.modules and not torch.ops.loaded_libraries"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(
    ("is_there", "capability", "due"),
    [(False, None, "no CUDA device"), (True, (7, 5), "capability 8.0"), (True, (8, 6), None)],
)
def test_cuda_kernels_want_a_device_that_runs_them(
    cuda_kernels, monkeypatch, backend, is_there, capability, due
):
    pytest.importorskip("triton")
    asked = cuda_device_reason.__wrapped__  # behind its cache
    monkeypatch.setattr(cuda_device, "unavailable_reason", asked)
    monkeypatch.setattr(triton, "unavailable_reason", triton.unavailable_reason.__wrapped__)
    monkeypatch.setattr(triton, "interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    call = {"device": "cuda", "dtype": torch.float16}
    _, reason = resolve("rel_attention", backend=backend, **call)
    assert (reason is None) == (due is None)
    assert due is None or due in reason
    assert (resolve("rel_attention", **call).backend == "reference") == (due is not None)
