"""Settings of all tests: torch's threads, hypothesis's profile, the requirements of CI."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Generator

import pytest
import torch
from hypothesis import HealthCheck, settings

from txl_kernels.backends import native

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


# A shell ignores SIGINT in the commands that it starts in the background, and so would the programs
# that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Fails at once if CI has no native kernels: their tests would be skipped."""
    if os.environ.get("CI") and (reason := native.unavailable_reason()) is not None:
        raise pytest.UsageError(f"CI needs the native kernels: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, a skipped gate of the CUDA kernels is a failure if nvcc is installed."""
    report = yield
    if report.skipped and os.environ.get("CI") and item.path.name == "test_cuda_gates.py":
        nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
        if nvcc is not None:
            report.outcome = "failed"
            report.longrepr = f"skipped although {nvcc} is installed: {report.longrepr[-1]}"
    return report
