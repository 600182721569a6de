"""The documents of commands that read texts: whole files, their lines, or the standard input."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformer_xl.data.sources import Piece

STDIN = "stdin"


def read_documents(
    files: Sequence[Path], lines: bool, is_text: bool
) -> Iterator[tuple[str, bytes]]:
    """Yield names and bytes of the documents: of each file or each of its lines, or of stdin.

    A line has its end, as in the file. The byte-order mark before a text is left out. A name has
    U+FFFD for bytes that are not UTF-8.
    """
    named = ((_shown(path), b"".join(Piece(path).chunks())) for path in files)
    for name, read in named if files else [(STDIN, sys.stdin.buffer.read())]:
        data = read.removeprefix(codecs.BOM_UTF8) if is_text else read
        if lines:
            split = io.BytesIO(data).readlines()
            yield from ((f"{name}:{i}", line) for i, line in enumerate(split, start=1))
        else:
            yield name, data


def _shown(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")
