"""Fixtures of the tests of `patch`, `unpatch`, `report` and `patched`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transformer_xl.integrations import unpatch

from .parakeet_like import D, Model


@pytest.fixture
def model():
    torch.manual_seed(0)
    yield Model()
    unpatch()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1))
