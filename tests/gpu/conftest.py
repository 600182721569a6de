"""GPU tests: `pytest -m gpu`. Without a GPU they are skipped, with the reason."""

from __future__ import annotations

import contextlib

import pytest
import torch

from txl_kernels import BackendUnavailableError, resolve
from txl_kernels.testing.interpreter import faster_interpreter


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="cpu: the CPU and Triton's interpreter")


@pytest.fixture
def device(request):
    """The current GPU, or the CPU. The tests use TF32 nowhere."""
    device = request.config.getoption("--device", "cuda")
    _, reason = resolve("rel_attention", backend="triton", device=device)
    if reason is not None:
        pytest.skip(reason)
    torch.set_float32_matmul_precision("highest")
    with faster_interpreter() if device == "cpu" else contextlib.nullcontext():
        yield device


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skips the calls that a backend does not support."""
    try:
        return (yield)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
