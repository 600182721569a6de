"""Members of .zip, .tgz and .tar.gz files: their sizes and their bytes."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive."""
    return path.suffix in (".zip", ".tgz") or path.name.endswith(".tar.gz")


def members(path: Path) -> dict[str, int]:
    """The size in bytes of each file in an archive, by name; ValueError if it is damaged."""
    with _sound(path):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                return {info.filename: info.file_size for info in archive.infolist()}
        with tarfile.open(path) as tar:
            return {info.name: info.size for info in tar if info.isfile()}


@contextmanager
def open_member(path: Path, name: str) -> Iterator[IO[bytes]]:
    """A file in an archive, for reading and seeking; ValueError if the archive is damaged."""
    with _sound(path):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive, archive.open(name) as file:
                yield file
        else:
            with tarfile.open(path) as tar:
                member = tar.extractfile(name)
                assert member is not None  # members() names files alone
                yield member


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{path}: the archive is damaged ({error})") from error
