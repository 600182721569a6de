"""What the tests of the kernels share: skipping a backend with `resolve`'s own sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from txl_kernels import resolve


@pytest.fixture
def require_backend():
    """Skips the test where `resolve` says that the named backend does not serve the call."""

    def require(op: str, backend: str, **call: Any) -> None:
        call = {"device": "cpu", "dtype": torch.float32, **call}
        _, reason = resolve(op, backend=backend, **call)
        if reason is not None:
            pytest.skip(reason)

    return require
