"""Where the bytes of a corpus are: files, members of archives, and ranges of either."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformer_xl.data.archives import (
    ARCHIVES,
    COMPRESSED,
    UNSUPPORTED,
    check_kind,
    is_archive,
    members,
    open_unpacked,
    size_of,
    stem,
)
from transformer_xl.data.token_file import READ_BYTES

SPLITS = ("train", "valid", "test")
ALIGN_BYTES = 1 << 16  # how far a cut in a plain file may move to reach the end of a line
# Members of an archive that are no text of the user's. "./", as `tar .` writes it, hides nothing.
HIDDEN = re.compile(r"(^|/)(\.(?!/)|__MACOSX/)")


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file, or of a member of an archive; None is its end.

    A file or member named .gz or .bz2 is decompressed; `start` and `stop` count bytes after that.
    `rewrite` is applied to the bytes before anything else.
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
        with open_unpacked(self.path, self.member) as file:
            file.seek(self.start)
            left = sys.maxsize if self.stop is None else self.stop - self.start
            while left > 0 and (data := file.read(min(left, READ_BYTES))):
                left -= len(data)
                yield self.rewrite(data) if self.rewrite else data
        if left > 0 and self.stop is not None:  # an archive may have a wrong size
            raise ValueError(
                f"{self}: expected {self.stop:,} bytes or more, found {self.stop - left:,}"
            )

    def head(self, size: int) -> bytes:
        """The first bytes of the file or member, fewer if it is shorter."""
        with open_unpacked(self.path, self.member) as file:
            return file.read(size)

    @property
    def size(self) -> int:
        """Number of bytes."""
        stop = size_of(self.path, self.member) if self.stop is None else self.stop
        return stop - self.start


Splits = Mapping[str, Sequence[Piece]]


def find_piece(path: Path, names: Sequence[str]) -> Piece:
    """The file with one of `names` in a folder, in an archive, or in an archive in a folder.

    The first name that is found is used, with .gz or .bz2 after it or not. In an archive it is the
    end of a member's path.

    Raises:
        FileNotFoundError: there is none; the names are listed.
        ValueError: several archives in the folder hold one, or the archive cannot be read.
    """
    if path.is_dir():
        for file in (path / name for name in _with_endings(names)):
            if file.is_file():
                return Piece(file)
        archives = sorted(file for file in path.iterdir() if is_archive(file) and file.is_file())
    elif path.is_file():
        check_kind(path)
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
    """The file `path` itself, whatever its name, or else the result of `find_piece`."""
    check_kind(path)
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
    return _cut(piece, [sizes[0], sizes[0] + sizes[1]], sum(sizes))


def plain_text(path: Path) -> Splits:
    """A folder or archive with train, valid and test files, or one text cut 90/5/5 at line ends.

    The one text is a file, or the file in an archive that has the archive's name or is alone there.
    """
    if path.is_file():
        piece = _only_text(path) if is_archive(path) else find_file(path, [])
        if piece is not None:
            size = piece.size
            cuts = [_line_end(piece, size * percent // 100, size) for percent in (90, 95)]
            return _cut(piece, cuts, size)
    return three_files(path, ["{}.txt", "{}", "wiki.{}.tokens"])


def _only_text(archive: Path) -> Piece | None:
    """The file in an archive that has its name or is alone in it; None if there is no such file."""
    named = _find_member(archive, [stem(archive), f"{stem(archive)}.txt"])
    files = [name for name in members(archive) if not HIDDEN.search(name)]
    if named is None and len(files) == 1:
        return _member(archive, files[0])
    return named


def _cut(piece: Piece, cuts: Sequence[int], size: int) -> Splits:
    """The piece's bytes as train, valid and test, cut at two offsets."""
    edges = [0, *cuts, size]
    return {
        split: [replace(piece, start=start, stop=stop)]
        for split, start, stop in zip(SPLITS, edges, edges[1:], strict=False)
    }


def _line_end(piece: Piece, at: int, size: int) -> int:
    """The first end of a line from `at` on; failing that of a word, then of a UTF-8 character."""
    before = max(at - 2, 0)  # a cut right after a line stays, after both bytes of its end
    near = b"".join(replace(piece, start=before, stop=min(at + ALIGN_BYTES, size)).chunks())
    for separator in (rb"\r\n|[\r\n]", rb" "):
        for found in re.finditer(separator, near):
            if before + found.end() >= at:
                return before + found.end()
    rest = near[at - before :]
    return at + next((i for i, byte in enumerate(rest) if byte & 0xC0 != 0x80), len(rest))


def _with_endings(names: Sequence[str]) -> list[str]:
    return [name + ending for name in names for ending in ("", *COMPRESSED)]


def _find_member(archive: Path, names: Sequence[str]) -> Piece | None:
    held = members(archive)
    fitting = (
        member
        for name in _with_endings(names)
        for member in held
        if f"/{member}".endswith(f"/{name}")
    )
    member = next(fitting, None)
    return None if member is None else _member(archive, member)


def _member(archive: Path, name: str) -> Piece:
    if Path(name).name.lower().endswith((*ARCHIVES, *UNSUPPORTED)):
        raise ValueError(f"{archive}:{name}: an archive in an archive cannot be read: unpack it")
    return Piece(archive, name)
