"""Fixtures of the tests with NVIDIA's nemo-toolkit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from transformer_xl.integrations import unpatch

# The tests import encoders.py by this name.
spec = importlib.util.spec_from_file_location("encoders", Path(__file__).with_name("encoders.py"))
assert spec is not None
assert spec.loader is not None
encoders = sys.modules["encoders"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(encoders)


@pytest.fixture(autouse=True)
def nemo_toolkit() -> Any:
    for name in ("nemo", "omegaconf", "hydra", "wrapt"):
        pytest.importorskip(name, reason="make test-dropins installs it and runs these tests")
    encoders.load()
    yield
    unpatch()
