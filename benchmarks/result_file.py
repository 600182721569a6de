"""The JSON files of results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformer_xl.data.files import to_json


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Writes a temporary file and renames it, so that `path` is always a whole document.

    NaN and infinities, which JSON does not have, become null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(to_json(document, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
