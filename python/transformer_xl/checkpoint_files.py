"""Files of a checkpoint: tensors, and a directory that is replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformer_xl.data.files import check_regular, linked
from transformer_xl.messages import brief, shortened

# Types of weights, optimizer states, memories and random-number states.
DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"})


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another kind, or that could not be saved."""


@contextlib.contextmanager
def written_beside(directory: Path) -> Iterator[Path]:
    """The path of the unfinished checkpoint, which is removed if writing it fails."""
    new = unfinished(directory)
    try:
        yield new
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        kept = f"; the last checkpoint, {directory}, stays" if directory.exists() else ""
        raise CheckpointError(f"checkpoint not saved: {error}{kept}") from error


def replace(new: Path, directory: Path) -> None:
    """Rename the complete, flushed directory `new` to `directory`.

    A directory that is not empty cannot be renamed over: between the two renames the previous
    checkpoint is whole under its other name, where `open_checkpoint` and `tidy` look for it.
    """
    flush(new)
    if directory.exists():
        directory.rename(previous(directory))
    new.rename(directory)
    flush(directory.parent)
    shutil.rmtree(previous(directory), ignore_errors=True)


def tidy(directory: Path) -> None:
    """Remove the unfinished files of a killed `save`, and rename the previous checkpoint back to
    `directory` if it was moved away."""
    directory = linked(directory)
    shutil.rmtree(unfinished(directory), ignore_errors=True)
    old = previous(directory)
    if old.exists() and not directory.exists():
        old.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def previous(directory: Path) -> Path:
    """The name of the previous checkpoint between the two renames of `replace`."""
    return directory.parent / f"{directory.name}.previous"


def unfinished(directory: Path) -> Path:
    """The name of a checkpoint that is being written."""
    return directory.parent / f"{directory.name}.new"


def open_tensors(path: Path) -> safe_open | CheckpointError:
    """Map a file of tensors; an error is returned, since not every reader needs every file."""
    try:
        refuse_pickle(path)
        return safe_open(path, framework="pt")
    except CheckpointError as error:
        return error
    except (SafetensorError, ValueError) as error:
        return CheckpointError(f"{path} is damaged: {brief(error)}")
    except OSError as error:
        return CheckpointError(f"{path} cannot be read: {error}")


def read_tensors(path: Path, file: Any) -> dict[str, Tensor]:
    """The tensors of an open file in memory of their own, aligned as any other tensor: then
    products of the same numbers have the same bits before saving and after loading.

    Raises:
        CheckpointError: the file is damaged, or a tensor is of a type that no checkpoint has.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
            if (dtype := file.get_slice(name).get_dtype()) not in DTYPES:
                expected = ", ".join(sorted(DTYPES))
                raise CheckpointError(
                    f"{path} is damaged: {shortened(name)}: expected one of the types {expected}, "
                    f"found {dtype}"
                )
            tensors[name] = file.get_tensor(name).clone()
    except (SafetensorError, TypeError, RuntimeError) as error:  # a size may exceed 64 bits
        raise CheckpointError(f"{path} is damaged: {brief(error)}") from error
    return tensors


def shapes(path: Path, file: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of an open file, which are not read."""
    try:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {brief(error)}") from error


def refuse_pickle(path: Path) -> None:
    """CheckpointError if the file is a pickle, or a zip archive as torch.save writes it.

    Raises ValueError for a folder, a FIFO or a device.
    """
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file is the length of its header in 8 bytes, then the header's brace.
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if start[:4] == b"PK\x03\x04" or (pickled and start[8:] != b"{"):
        raise CheckpointError(
            f"{path} is a pickle, which is never loaded here (it can run any code); "
            "expected a checkpoint directory of safetensors"
        )


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a new safetensors file, with `metadata` in its header and the mode that any new file
    has here."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # as the umask or the folder's access list sets it
    safetensors.torch.save_file(contiguous, path, metadata)  # replaces the file by one of mode 0600
    path.chmod(mode)
    flush(path)


def flush(path: Path) -> None:
    """Have a file's, or a directory's, contents on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
