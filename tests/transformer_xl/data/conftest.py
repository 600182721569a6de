"""Tiny corpora in the published file formats, and the real text where it is present."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from transformer_xl.config import DataConfig
from transformer_xl.data import Corpus, open_corpus

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Corpus]:
    """`open_corpus` with a cache of this test's own."""

    def open_named(name: str, path: Path | None = None, **fields: object) -> Corpus:
        place = None if path is None else str(path)
        return open_corpus(
            DataConfig(name=name, path=place, cache_dir=str(tmp_path / "cache"), **fields)
        )

    return open_named


@pytest.fixture
def real_text() -> Callable[[str], Path]:
    """The place of a real text; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"the text {name} is not in {SHARED}")
        return SHARED / name

    return find


@pytest.fixture
def split_files(tmp_path: Path) -> Callable[..., Path]:
    """Write train, valid and test files named by a pattern into a folder."""

    def write(pattern: str, train: str, valid: str, test: str) -> Path:
        for split, text in {"train": train, "valid": valid, "test": test}.items():
            path = tmp_path / "files" / pattern.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path / "files"

    return write
