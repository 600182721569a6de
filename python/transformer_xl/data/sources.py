"""Where the bytes of a corpus lie: files, members of archives, and ranges of either."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from transformer_xl.data.archives import is_archive, members, open_member
from transformer_xl.data.token_file import READ_BYTES

SPLITS = ("train", "valid", "test")
ALIGN_BYTES = 1 << 16  # how far a cut in a plain file may move to reach the end of a line


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file, or of a member of a .zip or .tgz; None is its end.

    `rewrite` is what is done to the bytes before anything else.
    """

    path: Path
    member: str | None = None
    start: int = 0
    stop: int | None = None
    rewrite: Callable[[bytes], bytes] | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in chunks of READ_BYTES."""
        with self._open() as file:
            file.seek(self.start)
            left = self.size
            while left > 0 and (data := file.read(min(left, READ_BYTES))):
                left -= len(data)
                yield self.rewrite(data) if self.rewrite else data

    @property
    def size(self) -> int:
        """Number of bytes."""
        return (self._whole() if self.stop is None else self.stop) - self.start

    def _whole(self) -> int:
        return members(self.path)[self.member] if self.member else self.path.stat().st_size

    def _open(self) -> AbstractContextManager[IO[bytes]]:
        return open_member(self.path, self.member) if self.member else self.path.open("rb")


Splits = Mapping[str, Sequence[Piece]]


def find_piece(path: Path, names: Sequence[str]) -> Piece:
    """The file that one of `names` names in a folder, in an archive, or in an archive in a folder.

    The first name that fits is taken; in an archive it is the end of a member's path.

    Raises:
        FileNotFoundError: none is there; the names are listed.
        ValueError: several archives in the folder hold one.
    """
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return Piece(path / name)
        archives = sorted(file for file in path.iterdir() if is_archive(file))
    elif path.is_file():
        archives = [path] if is_archive(path) else []
    else:
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    found = [piece for archive in archives if (piece := _find_member(archive, names))]
    if not found:
        raise FileNotFoundError(f"{path}: expected {' or '.join(names)} in it")
    if len(found) > 1:
        raise ValueError(f"{path}: expected one archive, found {found[0]} and {found[1]}")
    return found[0]


def find_file(path: Path, names: Sequence[str]) -> Piece:
    """The file `path` itself, whatever its name, or where `find_piece` finds it."""
    if path.is_file() and not is_archive(path):
        return Piece(path)
    return find_piece(path, names)


def three_files(path: Path, patterns: Sequence[str]) -> Splits:
    """A file for each split, named by patterns such as `wiki.{}.tokens`."""
    return {
        split: [find_piece(path, [pattern.format(split) for pattern in patterns])]
        for split in SPLITS
    }


def one_file(piece: Piece, sizes: Sequence[int]) -> Splits:
    """One file cut into train, valid and test of these sizes in bytes; ValueError if they do not
    add up to the file."""
    if piece.size != sum(sizes):
        raise ValueError(
            f"{piece}: expected {sum(sizes):,} bytes, found {piece.size:,}; as plain text it can "
            "be read under the name 'text'"
        )
    return _cut(piece, [sizes[0], sizes[0] + sizes[1]])


def plain_text(path: Path) -> Splits:
    """A folder with train, valid and test files, or one file cut 90/5/5 where lines end."""
    if path.is_dir():
        return three_files(path, ["{}.txt", "{}", "wiki.{}.tokens"])
    piece = find_file(path, [path.stem, f"{path.stem}.txt"])
    return _cut(piece, [_line_end(piece, piece.size * percent // 100) for percent in (90, 95)])


def _cut(piece: Piece, cuts: Sequence[int]) -> Splits:
    edges = [0, *cuts, piece.size]
    return {
        split: [replace(piece, start=start, stop=stop)]
        for split, start, stop in zip(SPLITS, edges, edges[1:], strict=False)
    }


def _line_end(piece: Piece, at: int) -> int:
    """The first end of a line from `at` on; failing that of a word, then of a UTF-8 character."""
    before = max(at - 1, 0)  # a cut right after a line stays
    near = replace(piece, start=before, stop=min(at + ALIGN_BYTES, piece.size))
    after = b"".join(near.chunks())
    for separator in (b"\n", b" "):
        found = after.find(separator)
        if found >= 0:
            return before + found + 1
    rest = after[at - before :]
    return at + next((i for i, byte in enumerate(rest) if byte & 0xC0 != 0x80), len(rest))


def _find_member(archive: Path, names: Sequence[str]) -> Piece | None:
    held = members(archive)
    fitting = (member for name in names for member in held if f"/{member}".endswith(f"/{name}"))
    member = next(fitting, None)
    return None if member is None else Piece(archive, member)
