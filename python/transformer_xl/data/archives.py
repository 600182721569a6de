"""Archives (.zip, .tar and compressed .tar) and .gz and .bz2 files: sizes and bytes, unpacked."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, cast

from transformer_xl.data.files import check_regular
from transformer_xl.messages import brief

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
    # Raised by zipfile and tarfile for impossible sizes, offsets and names.
    ValueError,
    OverflowError,
    MemoryError,
    LookupError,
    AttributeError,
    struct.error,
)
HEADER_BYTES = 1 << 20  # of one member of a tar, long names included
MOST_MEMBERS = 100_000  # of a tar
XZ_MEMORY = 256 << 20  # `xz -9` needs 65 MiB
CHUNK = 1 << 16
# zipfile unpacks all other methods without a limit on the memory.
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


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
    check_regular(path)
    with _sound(path):
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
                for info in infos:  # older versions of Python do not check this
                    if info.header_offset < 0:
                        raise ValueError(f"{info.filename} begins at byte {info.header_offset}")
                return {info.filename: info.file_size for info in infos}
        with _opened_tar(path) as (tar, source):
            return {info.name: info.size for info in _tar_files(tar, source)}


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
    check_regular(path)
    name = (member or path.name).lower()
    is_packed = member is not None or name.endswith(COMPRESSED)
    with _sound(path) if is_packed else nullcontext(), ExitStack() as stack:
        file = stack.enter_context(path.open("rb") if member is None else _open(path, member))
        if name.endswith(".gz"):
            file = stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=file)))
        elif name.endswith(".bz2"):
            file = stack.enter_context(cast(IO[bytes], bz2.BZ2File(file)))
        yield file


@contextmanager
def _open(path: Path, member: str) -> Iterator[IO[bytes]]:
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(member)
            if info.compress_type not in ZIP_METHODS:
                raise _RefusedError(
                    f"{member}: expected it stored (method 0) or deflated (method 8), found "
                    f"method {info.compress_type}: unpack it"
                )
            with archive.open(info) as file:
                yield file
    else:
        with _opened_tar(path) as (tar, source):
            newest_first = reversed([*_tar_files(tar, source)])
            header = next(header for header in newest_first if header.name == member)
            source.left = sys.maxsize
            extracted = tar.extractfile(header)
            assert extracted is not None  # it is a regular file
            yield extracted


class _RefusedError(ValueError):
    """A sound archive of a kind or size that is not read."""


class _Source(io.BufferedIOBase):
    """The bytes of a tar, of which the headers of one member may read a limited number.

    tarfile reads each header at once, and the size of a header in compressed data has no relation
    to that of the archive.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = HEADER_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        """As for any file; _RefusedError beyond the limit."""
        if size is None or not 0 <= size <= self.left:
            raise _RefusedError(f"a header of more than {HEADER_BYTES:,} bytes")
        self.left -= size
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


class _Xz(io.RawIOBase):
    """The content of .xz data, unpacked with a limit on memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._rewind()

    def _rewind(self) -> None:
        self._file.seek(0)
        self._decompressor = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
        self._data = b""
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As for any file, by unpacking up to there; the end is not supported."""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("seek from the end")
        target = offset + (self._at if whence == io.SEEK_CUR else 0)
        if target < self._at:
            self._rewind()
        while self._at < target and self._next(min(target - self._at, io.DEFAULT_BUFFER_SIZE)):
            pass
        return self._at

    def _next(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        while size:
            if self._decompressor.eof:  # another stream may follow
                self._data = self._decompressor.unused_data or self._file.read(CHUNK)
                if not self._data.lstrip(b"\0"):
                    return b""
                self._data = self._data.lstrip(b"\0")
                self._decompressor = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            if self._decompressor.needs_input and not self._data:
                self._data = self._file.read(CHUNK)
                if not self._data:
                    raise EOFError("the data ends before its end mark")
            unpacked = self._decompressor.decompress(self._data, size)
            self._data = b""
            if unpacked:
                self._at += len(unpacked)
                return unpacked
        return b""


@contextmanager
def _opened_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, _Source]]:
    """A tar, unpacked while it is read if it is compressed."""
    with path.open("rb") as packed:
        start = packed.read(6)
        packed.seek(0)
        file = cast(IO[bytes], packed)
        if start.startswith(b"\x1f\x8b"):
            file = cast(IO[bytes], gzip.GzipFile(fileobj=packed))
        elif start.startswith(b"BZh"):
            file = cast(IO[bytes], bz2.BZ2File(packed))
        elif start.startswith(b"\xfd7zXZ\0"):
            file = cast(IO[bytes], io.BufferedReader(_Xz(packed)))
        source = _Source(file)
        with tarfile.open(fileobj=cast(IO[bytes], source), mode="r:") as tar:
            yield tar, source


def _tar_files(tar: tarfile.TarFile, source: _Source) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar in their order; _RefusedError for too many members."""
    before = -1
    for _ in range(MOST_MEMBERS):
        source.left = HEADER_BYTES
        info = tar.next()
        if info is None:
            return
        if info.size < 0 or info.offset <= before:  # tarfile would read the same header again
            raise tarfile.ReadError(f"a member of {info.size:,} bytes")
        before = info.offset
        if info.issparse():
            raise _RefusedError(f"{info.name!r} is sparse, which cannot be read: unpack it")
        if info.isfile():
            yield info
    raise _RefusedError(f"more than {MOST_MEMBERS:,} members")


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    kind = "archive" if is_archive(path) else "compressed file"
    try:
        yield
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from error
    except DAMAGE as error:
        raise ValueError(f"{path}: the {kind} is damaged ({brief(error)})") from error
    except OSError as error:
        # The file itself cannot be opened, or the disk fails.
        if error.filename is not None or error.errno not in (None, errno.EINVAL):
            raise
        # bz2 raises a bare OSError for data that is not its own, a seek to a wrong offset another.
        raise ValueError(f"{path}: the {kind} is damaged ({brief(error)})") from error
