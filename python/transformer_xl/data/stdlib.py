"""The embedded default corpus: the source of the Python standard library that runs this program.
Nothing is downloaded, nothing is shipped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from transformer_xl.data.sources import SPLITS, Piece, Splits

# Installed packages, caches, tests and their data; config-* is written when Python is built.
SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def stdlib_files(root: Path) -> Splits:
    """The *.py files of the standard library in the folder `root`, split 90/5/5 by bytes.

    Files are drawn in the order of the SHA-256 of their relative path until 90% and 95% of the
    bytes are reached, and stand in alphabetic order within a split.

    Raises FileNotFoundError where there is no source, as in a Python without its .py files.
    """
    names = sorted(_names(root), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    if not names:
        raise FileNotFoundError(f"{root}: expected the standard library's .py files in it")
    sizes = [(root / name).stat().st_size for name in names]
    drawn: dict[str, list[str]] = {split: [] for split in SPLITS}
    done = 0
    for name, size in zip(names, sizes, strict=True):
        share = (done + size / 2) / sum(sizes)
        drawn["train" if share < 0.9 else "valid" if share < 0.95 else "test"].append(name)
        done += size
    return {split: [Piece(root / name) for name in sorted(drawn[split])] for split in SPLITS}


def _names(root: Path) -> Iterator[str]:
    """Relative paths, with forward slashes, of the files that belong to the corpus."""
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not _skipped(f)]
        for file in files:
            if file.endswith(".py") and not _skipped(file):
                yield (Path(folder) / file).relative_to(root).as_posix()


def _skipped(name: str) -> bool:
    return name.startswith(SKIPPED_PREFIXES)
