"""GPU tests: `pytest -m gpu`. Without a GPU one test of each file is skipped, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from txl_kernels import resolve

HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if item.path.parent == HERE]
    _, reason = resolve("rel_attention", backend="triton", device="cuda")
    if reason is None or not ours:
        return
    first = {item.path: item for item in reversed(ours)}
    for item in first.values():
        item.add_marker(pytest.mark.skip(reason=reason))
    others = [item for item in ours if item is not first[item.path]]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


@pytest.fixture
def device():
    """The current GPU. The tests use TF32 nowhere."""
    torch.set_float32_matmul_precision("highest")
    return "cuda"
