"""Fixtures of the tests of `patch`, `unpatch`, `report` and `patched`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transformer_xl.integrations import unpatch

# The tests import parakeet_like.py by this name.
path = Path(__file__).with_name("parakeet_like.py")
spec = importlib.util.spec_from_file_location("parakeet_like", path)
assert spec is not None
assert spec.loader is not None
parakeet_like = sys.modules["parakeet_like"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parakeet_like)


@pytest.fixture
def model():
    torch.manual_seed(0)
    yield parakeet_like.Model()
    unpatch()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, parakeet_like.D, generator=torch.Generator().manual_seed(1))
