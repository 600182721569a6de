"""Files to text, as a stream: strict UTF-8 with the offset of what is not, and whole lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from transformer_xl.data.sources import Piece

MAX_LINE = 1 << 22  # characters after which a line may be cut at a space


def decode_stream(piece: Piece) -> Iterator[str]:
    """The text of a piece, chunk by chunk; ValueError with file and byte offset if not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = piece.start  # offset in the file of what the decoder is given next
    for data, final in _with_final(piece.chunks()):
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{piece}: expected UTF-8 text, found byte {error.object[error.start]:#04x} at "
                f"offset {at - kept + error.start:,} ({error.reason})"
            ) from error
        at += len(data)
        if text:
            yield text


def whole_lines(texts: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end with a line; one above MAX_LINE may be cut after a space."""
    pending = ""
    for text in texts:
        pending += text
        cut = pending.rfind("\n") + 1
        if cut == 0 and len(pending) > MAX_LINE:
            cut = pending.rfind(" ") + 1
        if cut:
            yield pending[:cut]
            pending = pending[cut:]
    if pending:
        yield pending


def _with_final(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for chunk in chunks:
        yield chunk, False
    yield b"", True
