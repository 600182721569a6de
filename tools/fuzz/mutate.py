"""Changes of a fuzzing input that keep enough of its structure to reach beyond the first check."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import struct
from collections.abc import Callable
from typing import Any

BLOCK = 512  # of a tar
TAR_MARK, TAR_SIZE, TAR_TYPE, TAR_CHECKSUM = slice(257, 262), slice(124, 136), 156, slice(148, 156)
ODD_TEXTS = (
    *("", "\0", "a b", "\ud800", "é☃", "../../etc/passwd", "/dev/zero", "x" * 5000, "%s{0}", "O"),
    *("<unk>", "<eos>", "<S>", "byte", "char", "word", "bpe", "nan", "-1", "1e999", "none", "true"),
    *("uint8", "uint16", "uint32", "int64", "F32", "I64", "F8_E4M3", "BOOL", "U8", "layers.0"),
)
ODD_NUMBERS = (
    *(0, 1, -1, 2, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64),
    *(-(2**63), 10**12, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Another input made from this one: its first byte selects a file, the rest is its content."""
    head, content = data[:1], data[1:]
    if rng.random() < 0.02:
        head = bytes([rng.randrange(16)])
    for change in (_compressed, _tar, _tensors, _tree, _lines):
        if rng.random() < 0.7 and (changed := change(content, rng)) is not None:
            return head + changed
    return head + _bytes(content, rng)


def _compressed(content: bytes, rng: random.Random) -> bytes | None:
    """Compressed data with its content changed, or None for other data."""
    kinds: dict[bytes, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        b"\x1f\x8b": (gzip.decompress, gzip.compress),
        b"BZh": (bz2.decompress, bz2.compress),
        b"\xfd7zXZ": (lzma.decompress, lzma.compress),
    }
    for mark, (unpack, pack) in kinds.items():
        if content.startswith(mark) and len(content) < 10_000:
            try:
                inner = unpack(content)
            except Exception:  # an input that was damaged before
                return None
            if len(inner) < 100_000:
                return pack(
                    (_tar(inner, rng) if rng.random() < 0.8 else None) or _bytes(inner, rng)
                )
    return None


def _tar(content: bytes, rng: random.Random) -> bytes | None:
    """A tar with one header changed and its checksum corrected, or None for other data."""
    starts = [at for at in range(0, len(content), BLOCK) if content[at:][TAR_MARK] == b"ustar"]
    if not starts:
        return None
    at = rng.choice(starts)
    header = bytearray(content[at : at + BLOCK])
    if len(header) < BLOCK:
        return None
    choice = rng.randrange(4)
    if choice == 0:
        header[TAR_TYPE] = rng.choice(b"0123456789xgLKSDV\0")
    elif choice == 1:
        number = rng.choice([0, 1, -1, 511, 513, 2**31, 2**40, 2**62, -512])
        header[TAR_SIZE] = b"\x80" + struct.pack(">3xq", number)
        if number < 0:
            header[TAR_SIZE] = b"\xff" * 4 + struct.pack(">q", number)
    elif choice == 2:
        header[rng.randrange(BLOCK)] = rng.randrange(256)
    else:
        header[TAR_SIZE] = b"%011o\0" % rng.choice([0, 1, 512, 8**10, 8**11 - 1])
    header[TAR_CHECKSUM] = b" " * 8
    header[TAR_CHECKSUM] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + BLOCK :]


def _tensors(content: bytes, rng: random.Random) -> bytes | None:
    """A safetensors file with its header changed and the header's length corrected, or None."""
    if content[8:9] != b"{":
        return None
    length = int.from_bytes(content[:8], "little")
    header = _tree(content[8 : 8 + length], rng)
    if header is None:
        return None
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _tree(content: bytes, rng: random.Random) -> bytes | None:
    """JSON with some of its values changed, or None for other data."""
    if content[:1] not in (b"{", b"["):
        return None
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if rng.random() < 0.01:
        depth = rng.choice([10, 200, 100_000])
        return b"[" * depth + b"]" * depth
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        tree = _changed(tree, rng)
    return json.dumps(tree).encode()


def _changed(tree: Any, rng: random.Random) -> Any:
    if isinstance(tree, dict) and tree and rng.random() < 0.95:
        key = rng.choice(list(tree))
        choice = rng.random()
        if choice < 0.07:
            return {k: v for k, v in tree.items() if k != key}
        if choice < 0.12:
            return tree | {str(rng.choice(ODD_TEXTS)): tree[key]}
        if choice < 0.16:
            return tree | {key: tree[rng.choice(list(tree))]}
        return tree | {key: _changed(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        at = rng.randrange(len(tree))
        choice = rng.random()
        if choice < 0.15:
            return tree[:at] + tree[at + 1 :]
        if choice < 0.3:
            return [*tree[:at], *tree[at : at + 1] * rng.choice([2, 3, 300]), *tree[at + 1 :]]
        return [*tree[:at], _changed(tree[at], rng), *tree[at + 1 :]]
    if isinstance(tree, int) and rng.random() < 0.3:
        return tree + rng.choice([-1, 1, 8, -8])
    nested: list[Any] = [tree]
    odd: tuple[Any, ...] = (None, True, False, [], {}, nested, {"a": tree}, [None] * 3)
    return rng.choice(rng.choice([odd, ODD_TEXTS, ODD_NUMBERS]))


def _lines(content: bytes, rng: random.Random) -> bytes | None:
    """Text with one line changed, repeated or removed, or None for one line or binary data."""
    lines = content.splitlines(keepends=True)
    if not 1 < len(lines) < 2000 or b"\0" in content:
        return None
    at = rng.randrange(len(lines))
    choice = rng.random()
    if choice < 0.15:
        del lines[at]
    elif choice < 0.3:
        lines[at] *= rng.choice([2, 3, 50])
    else:
        line = lines[at]
        changed = _tree(line, rng)
        if changed is None and rng.random() < 0.6:
            for mark in (b"=", b": "):
                if mark in line:
                    odd = str(rng.choice(rng.choice([ODD_TEXTS, ODD_NUMBERS])))
                    changed = line.split(mark)[0] + mark + odd.encode("utf-8", "replace")
                    break
        lines[at] = (_bytes(line.rstrip(b"\n"), rng) if changed is None else changed) + b"\n"
    return b"".join(lines)


def _bytes(content: bytes, rng: random.Random) -> bytes:
    """Any data with some bytes changed, inserted or removed."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(data) + 1)
        choice = rng.randrange(6)
        if choice == 0 and data:
            data[at - 1] ^= 1 << rng.randrange(8)
        elif choice == 1:
            data[at : at + rng.choice([1, 2, 8, 100])] = b""
        elif choice == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 16]))
        elif choice == 3:
            width = rng.choice([1, 2, 4, 8])
            data[at : at + width] = rng.choice(
                [b"\xff" * width, b"\0" * width, b"\x80" + b"\0" * (width - 1)]
            )
        elif choice == 4:
            data[at:at] = data[at : at + rng.choice([4, 64, 1000])]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)
