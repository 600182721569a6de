"""Every file of a run and of its encoded corpus has the mode that the umask gives."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformer_xl.config import RunConfig, override
from transformer_xl.training import train


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(tmp_path: Path, tiny_config: RunConfig, umask: int) -> None:
    changes = {"train.max_step": 1, "train.max_eval_steps": 1}
    config = override(tiny_config, changes | {"data.cache_dir": str(tmp_path / "files" / "cache")})
    train(config, tmp_path / "files" / "run")
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "files").rglob("*")}
    assert {path.suffix for path in modes} >= {".safetensors", ".json", ".jsonl", ".png", ".bin"}
    for path, mode in modes.items():
        assert oct(mode) == oct((0o777 if path.is_dir() else 0o666) & ~umask), path
