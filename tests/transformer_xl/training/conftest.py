"""Runs of the command in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from transformer_xl.config import RunConfig
from transformer_xl.config_fields import to_dict


@pytest.fixture
def train_arguments() -> Callable[[RunConfig, Path], list[str]]:
    """What `transformer-xl train` takes to run a configuration, every field given."""

    def arguments(config: RunConfig, out: Path) -> list[str]:
        fields = []
        for section, values in to_dict(config).items():
            for name, value in values.items():
                text = ",".join(map(str, value)) if isinstance(value, list) else value
                fields.append(f"{section}.{name}={'none' if text is None else text}")
        return ["demo", *fields, "--out", str(out)]

    return arguments
