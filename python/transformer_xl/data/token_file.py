"""Token files: the ids of one split as plain little-endian integers, written as a stream, read as a
memory map, with size and hash kept in a record beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from transformer_xl.data.files import check_regular, is_int
from transformer_xl.messages import shortened

TokenArray = NDArray[np.unsignedinteger[Any]]
TokenType = Literal["uint8", "uint16", "uint32"]

READ_BYTES = 1 << 22
SCAN_TOKENS = 1 << 22


def token_type(vocab_size: int) -> TokenType:
    """The narrowest type that holds every id of a vocabulary."""
    if vocab_size <= 1 << 8:
        return "uint8"
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class TokenFile:
    """What is known of a token file: its name in its folder, type, tokens and content."""

    name: str
    dtype: TokenType
    n_tokens: int
    sha256: str

    @classmethod
    def write(cls, path: Path, dtype: TokenType, chunks: Iterable[TokenArray]) -> TokenFile:
        """Write ids chunk by chunk; replacing what is there."""
        digest, n_tokens = hashlib.sha256(), 0
        with path.open("wb") as file:
            for chunk in chunks:
                data = chunk.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
                file.write(data)
                digest.update(data)
                n_tokens += len(chunk)
        return cls(path.name, dtype, n_tokens, digest.hexdigest())

    def fault(self, name: str) -> str | None:
        """What is wrong with this description of a file `name`, as a record may have it; or None.

        Another name could lead out of the folder, and another type could make numpy read objects.
        """
        if self.name != name:
            return f"name: expected {name!r}, found {shortened(self.name)}"
        if self.dtype not in get_args(TokenType):
            return f"dtype: expected one of {get_args(TokenType)}, found {shortened(self.dtype)}"
        if not is_int(self.n_tokens, at_least=1):
            return f"n_tokens: expected a positive integer, found {shortened(self.n_tokens)}"
        return None

    def open(self, folder: Path, vocab_size: int) -> TokenArray:
        """The ids, memory-mapped; ValueError if the file is not what was written, or an id is not
        below `vocab_size`."""
        path = folder / self.name
        expected = self.n_tokens * np.dtype(self.dtype).itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise damaged(path, f"expected {expected:,} bytes, found {found:,}")
        if file_sha256(path) != self.sha256:
            raise damaged(path, "its sha256 is not the recorded one")
        tokens = np.memmap(path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")
        if vocab_size < 1 << 8 * tokens.itemsize:  # else no id can be too large
            starts = range(0, len(tokens), SCAN_TOKENS)
            largest = max(int(tokens[at : at + SCAN_TOKENS].max()) for at in starts)
            if largest >= vocab_size:
                raise damaged(path, f"expected ids below {vocab_size:,}, found {largest:,}")
        return tokens


def damaged(path: Path, reason: str) -> ValueError:
    """The error for a file of the cache that is not what was written."""
    return ValueError(f"{path} is damaged: {reason}; delete {path.parent} to encode it again")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces; ValueError for a folder, FIFO or device."""
    check_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
