"""Files to text, as a stream: strict UTF-8 without a byte-order mark, and whole lines.

A line ends with "\\n", "\\r\\n" or "\\r", and with nothing else.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from transformer_xl.data.sources import Piece

MAX_LINE = 1 << 22  # characters after which a line may be cut
MAX_TEXT = 1 << 28  # characters of a vocabulary; the largest in use have a tenth
HEAD_BYTES = 16  # enough to recognise a kind of file
KINDS = {
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32",
    rb"\xff\xfe|\xfe\xff": "UTF-16",
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bzip2",
    rb"PK\x03\x04|PK\x05\x06": "zip",
    rb"\xfd7zXZ\0": "xz",
    rb"\x28\xb5\x2f\xfd": "Zstandard",
    rb"7z\xbc\xaf\x27\x1c": "7z",
    rb"Rar!\x1a\x07": "rar",
    rb"\x04\x22\x4d\x18": "lz4",
}


def decode_stream(piece: Piece) -> Iterator[str]:
    """The text of a piece, chunk by chunk, without the byte-order mark that may begin its file.

    Raises ValueError with the file if it is of another encoding or compressed, and with the byte
    offset too if a byte is not UTF-8 or is NUL.
    """
    piece = _without_mark(piece)
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = piece.start  # offset in the file of the next chunk
    for data, final in _with_final(piece.chunks()):
        if (nul := data.find(b"\0")) >= 0:
            raise ValueError(
                f"{piece}: expected UTF-8 text, found a NUL byte at offset {at + nul:,}: it is "
                "binary, or UTF-16 or UTF-32 without a byte-order mark; convert it to UTF-8"
            )
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final)
        except UnicodeDecodeError as error:
            raise not_utf8(piece, error, at - kept + error.start) from error
        at += len(data)
        if text:
            yield text


def read_text(piece: Piece) -> str:
    """The whole text of a piece; ValueError as `decode_stream`, and for more than MAX_TEXT."""
    parts, length = [], 0
    for part in decode_stream(piece):
        parts.append(part)
        length += len(part)
        if length > MAX_TEXT:  # a small compressed file may hold that much
            raise ValueError(f"{piece}: expected at most {MAX_TEXT:,} characters, found more")
    return "".join(parts)


def decode_whole(name: str, data: bytes, *, is_text: bool) -> str:
    """The text of these bytes; if they need not be text, other bytes become surrogates.

    Raises ValueError with the name and the byte offset if a byte of a text is not UTF-8.
    """
    try:
        return data.decode("utf-8", "strict" if is_text else "surrogateescape")
    except UnicodeDecodeError as error:
        raise not_utf8(name, error, error.start) from error


def not_utf8(name: object, error: UnicodeDecodeError, offset: int) -> ValueError:
    """The error for the byte at this offset of a file or document."""
    return ValueError(
        f"{name}: expected UTF-8 text, found byte {error.object[error.start]:#04x} at offset "
        f"{offset:,} ({error.reason})"
    )


def whole_lines(texts: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end with a line.

    A line above MAX_LINE may be cut, after its last space so far if it has one.
    """
    pending = ""
    for text in texts:
        pending += text
        # A "\r" at the end of what was read so far may be the first half of "\r\n".
        cut = max(pending.rfind("\n"), pending.rfind("\r", 0, -1)) + 1
        if cut == 0 and len(pending) > MAX_LINE:
            cut = pending.rfind(" ") + 1 or len(pending) - pending.endswith("\r")
        if cut:
            yield pending[:cut]
            pending = pending[cut:]
    if pending:
        yield pending


def split_lines(text: str) -> list[str]:
    """The lines of a text, each with its end."""
    return io.StringIO(text, newline="").readlines()


def with_newlines(text: str) -> str:
    """The text with "\\n" for the end of every line."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def byte_offsets(text: str) -> NDArray[np.int64]:
    """The offset in UTF-8 of each character of a text, and of its end: [len(text) + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + sum((codes >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _without_mark(piece: Piece) -> Piece:
    """The piece, after the byte-order mark if it begins with one, if its file may be UTF-8."""
    head = piece.head(HEAD_BYTES)
    for pattern, kind in KINDS.items():
        if re.match(pattern, head):
            raise ValueError(
                f"{piece}: expected UTF-8 text, found the first bytes of {kind} data; convert or "
                "decompress it first (.gz, .bz2 and archives are read if they are named so)"
            )
    marked = piece.start == 0 and head.startswith(codecs.BOM_UTF8)
    return replace(piece, start=len(codecs.BOM_UTF8)) if marked else piece


def _with_final(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for chunk in chunks:
        yield chunk, False
    yield b"", True
