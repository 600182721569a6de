"""The embedded default corpus: the standard library's source, the same at every opening."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from transformer_xl.data import Corpus
from transformer_xl.data.stdlib import stdlib_files


def test_it_needs_nothing_but_python(opened: Callable[..., Corpus]) -> None:
    corpus = opened("stdlib")
    sizes = [len(corpus.split(split)) for split in ("train", "valid", "test")]
    assert sum(sizes) > 5_000_000
    for size, share in zip(sizes, (0.9, 0.05, 0.05), strict=True):
        assert size / sum(sizes) == pytest.approx(share, abs=0.03)
    assert len(corpus.vocab) == 256
    assert corpus.metric == "bpc"
    assert f"{sum(sizes):,} bytes" in corpus.summary()
    assert corpus.fingerprint in corpus.summary()


def test_no_file_is_in_two_splits_and_no_test_or_package_is_in_any() -> None:
    splits = stdlib_files(Path(sysconfig.get_path("stdlib")))
    paths = [piece.path for pieces in splits.values() for piece in pieces]
    assert len(paths) == len(set(paths))
    folders = {part for path in paths for part in path.parts}
    assert not folders & {"site-packages", "dist-packages", "__pycache__", "idle_test"}
    assert all(path.suffix == ".py" for path in paths)


def test_the_split_depends_on_names_and_sizes_alone(tmp_path: Path) -> None:
    for place in ("one", "two"):
        for i in range(100):
            folder = tmp_path / place / f"package{i % 7}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"module{i}.py").write_text("x = 1\n" * 10)
        (tmp_path / place / "test").mkdir()
        (tmp_path / place / "test" / "test_module.py").write_text("not read")
        (tmp_path / place / "notes.txt").write_text("not read")
    one, two = (
        {
            split: [piece.path.relative_to(tmp_path / place) for piece in pieces]
            for split, pieces in stdlib_files(tmp_path / place).items()
        }
        for place in ("one", "two")
    )
    assert one == two
    assert [len(names) for names in one.values()] == [90, 5, 5]
    assert all(names == sorted(names) for names in one.values())


def test_a_python_without_its_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the standard library's .py files"):
        stdlib_files(tmp_path)
