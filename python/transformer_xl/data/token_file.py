"""Token files: the ids of one split as plain little-endian integers, written as a stream, read as a
memory map, with size and hash kept in a record beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.unsignedinteger[Any]]
TokenType = Literal["uint8", "uint16", "uint32"]

READ_BYTES = 1 << 22


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

    def open(self, folder: Path) -> TokenArray:
        """The ids, memory-mapped; ValueError if the file is not what was written."""
        path = folder / self.name
        expected = self.n_tokens * np.dtype(self.dtype).itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise damaged(path, f"expected {expected:,} bytes, found {found:,}")
        if file_sha256(path) != self.sha256:
            raise damaged(path, "its sha256 is not the recorded one")
        return np.memmap(path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")


def damaged(path: Path, reason: str) -> ValueError:
    """The error for a file of the cache that is not what was written."""
    return ValueError(f"{path} is damaged: {reason}; delete {path.parent} to encode it again")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
