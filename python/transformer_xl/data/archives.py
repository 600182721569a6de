"""Archives (.zip, .tar and compressed .tar) and .gz and .bz2 files: sizes and bytes, unpacked."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz")
ARCHIVES = (".zip", *TARS)
COMPRESSED = (".gz", ".bz2")  # a single file each
UNSUPPORTED = (".7z", ".rar", ".tar.zst", ".tzst")
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    RuntimeError,  # zipfile's error for an encrypted file or an unknown compression
)


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive that can be read."""
    return path.name.lower().endswith(ARCHIVES)


def check_kind(path: Path) -> None:
    """Raise ValueError for the name of an archive of a kind that cannot be read."""
    if path.name.lower().endswith(UNSUPPORTED):
        raise ValueError(
            f"{path}: this kind of archive cannot be read: unpack it, or pack it as one of "
            f"{', '.join(ARCHIVES)}"
        )


def stem(path: Path) -> str:
    """The name of an archive without its ending."""
    name = path.name.lower()
    ending = max((end for end in ARCHIVES if name.endswith(end)), key=len, default="")
    return path.name[: len(name) - len(ending)]


def members(path: Path) -> dict[str, int]:
    """The size in bytes of each file in an archive, by name; ValueError if it is damaged."""
    with _sound(path):
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                return {i.filename: i.file_size for i in archive.infolist() if not i.is_dir()}
        with tarfile.open(path) as tar:
            return {info.name: info.size for info in tar if info.isfile()}


def size_of(path: Path, member: str | None) -> int:
    """The size in bytes of a file, or of a member of an archive, decompressed."""
    if (member or path.name).lower().endswith(COMPRESSED):
        with open_unpacked(path, member) as file:
            return file.seek(0, io.SEEK_END)
    return path.stat().st_size if member is None else members(path)[member]


@contextmanager
def open_unpacked(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    """A file, or a member of an archive, for reading and seeking; .gz and .bz2 are decompressed.

    Raises ValueError if the file is damaged.
    """
    name = (member or path.name).lower()
    with _sound(path), ExitStack() as stack:
        file = stack.enter_context(path.open("rb") if member is None else _open(path, member))
        if name.endswith(".gz"):
            file = stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=file)))
        elif name.endswith(".bz2"):
            file = stack.enter_context(cast(IO[bytes], bz2.BZ2File(file)))
        yield file


@contextmanager
def _open(path: Path, member: str) -> Iterator[IO[bytes]]:
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file
    else:
        with tarfile.open(path) as tar:
            extracted = tar.extractfile(member)
            assert extracted is not None  # members() lists regular files only
            yield extracted


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    kind = "archive" if is_archive(path) else "compressed file"
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{path}: the {kind} is damaged ({error})") from error
    except OSError as error:
        if error.errno is not None:  # bz2 raises a bare OSError for data that is not its own
            raise
        raise ValueError(f"{path}: the {kind} is damaged ({error})") from error
