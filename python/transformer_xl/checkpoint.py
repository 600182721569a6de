"""Checkpoints: a directory of safetensors and JSON that is replaced as a whole or not at all.

    model.safetensors       every parameter and buffer once; a tied tensor's other names are in JSON
    optimizer.safetensors   the optimizer's tensors, `<parameter name>|<key>`
    rank-N.safetensors      one per process: its memory, its random-number states
    vocab.json              the vocabulary: a checkpoint can write text without its corpus
    state.json              format, config, step, schedule, data position, aliases, versions

Nothing here is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from transformer_xl.config import ModelConfig, RunConfig, differences, from_dict, to_dict
from transformer_xl.data import Vocabulary
from transformer_xl.data.files import expanded, linked, to_json
from transformer_xl.model import TransformerXL
from transformer_xl.nn.tensor_names import (
    optimizer_tensors,
    parameter_names,
    shape_difference,
    untied,
)

FORMAT = "transformer-xl checkpoint"
FORMAT_VERSION = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
VOCABULARY = "vocab.json"
# Fields of a model that may change while its weights keep their meaning.
ADJUSTABLE = frozenset(
    {"mem_len", "clamp_len", "same_length", "dropout", "dropatt", "sample_softmax"}
    | {"gradient_checkpointing"}
)
# Fields that determine the first weights alone.
INITIAL = frozenset({"init", "init_range", "init_std", "proj_init_std"})
# While a run saves a small model every few ms, about one opening in ten meets a replacement.
OPENINGS = 10


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another kind, or that could not be saved."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its state has been read, its tensors are read when they are needed.

    Its files stay open, so that all of them are of one step even if the run that writes it
    replaces it meanwhile.

    Args:
        path: the directory.
        run: the folder of the run that it belongs to.
        state: the content of `state.json`: the entries named above and everything given to `save`.
        vocabulary: the vocabulary of its model.
        files: its open tensor files by name; for a damaged one the error that reading it raises.
    """

    path: Path
    run: Path
    state: Mapping[str, Any]
    vocabulary: Vocabulary
    files: Mapping[str, safe_open | CheckpointError]

    @property
    def config(self) -> RunConfig:
        """The run that wrote it."""
        return from_dict(self.state["config"])

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self.state["step"])

    def load_model(self, model: nn.Module) -> None:
        """Copy the weights into `model`.

        Raises:
            CheckpointError: weights of another model, or weights that are not finite.
        """
        tensors = self._tensors(MODEL)
        try:
            tensors |= {alias: tensors[name] for alias, name in self.state["aliases"].items()}
        except KeyError as error:
            raise CheckpointError(f"{self.path / MODEL} is damaged: no tensor {error}") from None
        if difference := shape_difference(tensors, model.state_dict()):
            raise CheckpointError(f"{self.path} is of another model: {difference}")
        if isinstance(model, TransformerXL):
            check_model(self, model.config, ADJUSTABLE | INITIAL)
        if (name := first_not_finite(tensors)) is not None:
            raise CheckpointError(
                f"{self.path} holds a diverged model: its weight {name} is not finite; "
                "use an earlier checkpoint"
            )
        model.load_state_dict(tensors)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore the optimizer's state of each of `model`'s parameters."""
        per_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._tensors(OPTIMIZER).items():
            name, _, entry = key.partition("|")
            per_name.setdefault(name, {})[entry] = tensor
        names = parameter_names(model, optimizer)
        if unknown := set(per_name) - set(names):
            raise CheckpointError(
                f"{self.path}: optimizer state of {min(unknown)!r}: no such weight"
            )
        state = {i: per_name[name] for i, name in enumerate(names) if name in per_name}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def rank_tensors(self, rank: int, world_size: int) -> dict[str, Tensor]:
        """What process `rank` saved; CheckpointError if as many processes did not write it."""
        if (saved := self.state["world_size"]) != world_size:
            raise CheckpointError(
                f"{self.path} was written by {saved} processes and is resumed by {world_size}: "
                "memory and random numbers belong to each; start as many again"
            )
        return self._tensors(_rank_file(rank))

    def copy(self, directory: Path) -> None:
        """Write the same checkpoint to `directory`; raises CheckpointError as `save` does."""
        directory = linked(directory)
        with _written_beside(directory) as new:
            tidy(directory)
            new.mkdir(parents=True)
            for name in self.files:
                _write_tensors(new / name, self._tensors(name))
            _write_readable(new, self.vocabulary, self.state)
            _replace(new, directory)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file in memory of their own, aligned as any other tensor: then products
        of the same numbers have the same bits before saving and after loading."""
        file: Any = self.files.get(name)  # safe_open has no types
        if file is None:
            raise CheckpointError(f"{self.path} is damaged: it has no {name}")
        if isinstance(file, CheckpointError):
            raise file
        names = file.keys()
        try:
            return {key: file.get_tensor(key).clone() for key in names}
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / name} is damaged: {error}") from error


def save(
    directory: Path,
    *,
    model: nn.Module,
    config: RunConfig,
    state: Mapping[str, Any],
    vocabulary: Vocabulary,
    optimizer: torch.optim.Optimizer,
    rank_tensors: Mapping[str, Tensor],
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint beside `directory` and rename it to `directory`.

    A kill or a full disk at any moment leaves the previous checkpoint whole. A symbolic link stays:
    the directory that it names is replaced. All processes call this together; process 0 writes the
    files that they share.

    Args:
        state: values for JSON, at least "step"; `Checkpoint.state` returns them, with None for
            numbers that are not finite.
        rank_tensors: tensors of this process alone.
        wait: a barrier between the processes.

    Raises:
        CheckpointError: the disk is full or the place not writable; the last checkpoint stays.
    """
    directory = linked(directory)
    with _written_beside(directory) as new:
        if rank == 0:
            tidy(directory)
            new.mkdir(parents=True)
        wait()
        _write_tensors(new / _rank_file(rank), rank_tensors)
        if rank == 0:
            _write_shared(new, model, optimizer, vocabulary, config, state, world_size)
        wait()
        if rank == 0:
            _replace(new, directory)
        wait()


def open_checkpoint(path: Path) -> Checkpoint:
    """Find, open and check a checkpoint: the directory `path` itself or, in a run's folder, `last`.

    A leading `~` is the home directory. A checkpoint that a run replaces meanwhile is opened again.

    Raises:
        CheckpointError: there is no checkpoint, it is a pickle, of another format or damaged.
    """
    path = expanded(path)
    for _ in range(OPENINGS - 1):
        with contextlib.suppress(CheckpointError, FileNotFoundError):
            return _open(*_found(path))
    return _open(*_found(path))


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity; None if all are finite."""
    return next((name for name, t in tensors.items() if not bool(t.isfinite().all())), None)


def check_model(
    checkpoint: Checkpoint, expected: ModelConfig, may_differ: Collection[str] = ()
) -> None:
    """Raise CheckpointError, naming the fields, if the checkpoint is of another model than
    `expected`; the fields `may_differ` are not compared."""
    differing = [
        f"{name} {theirs} there, {ours} here"
        for name, (theirs, ours) in differences(checkpoint.config.model, expected).items()
        if name not in may_differ
    ]
    if differing:
        raise CheckpointError(f"{checkpoint.path} is of another model: {'; '.join(differing)}")


def check_tokenizer(path: Path, vocabulary: Vocabulary, tokenizer: str) -> None:
    """Raise CheckpointError if `data.tokenizer` requests another kind of token than the vocabulary
    of the checkpoint at `path`, which reads every text."""
    if tokenizer not in ("dataset", vocabulary.kind):
        raise CheckpointError(
            f"{path} has another vocabulary: data.tokenizer: expected 'dataset' or "
            f"{vocabulary.kind!r}, got {tokenizer!r}"
        )


def tidy(directory: Path) -> None:
    """Remove the unfinished files of a killed `save`, and rename the previous checkpoint back to
    `directory` if it was moved away."""
    directory = linked(directory)
    shutil.rmtree(_new(directory), ignore_errors=True)
    previous = _previous(directory)
    if previous.exists() and not directory.exists():
        previous.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def _written_beside(directory: Path) -> Iterator[Path]:
    """The path of the unfinished checkpoint, which is removed if writing it fails."""
    new = _new(directory)
    try:
        yield new
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        kept = f"; the last checkpoint, {directory}, stays" if directory.exists() else ""
        raise CheckpointError(f"checkpoint not saved: {error}{kept}") from error


def _found(path: Path) -> tuple[Path, Path]:
    """The directory of the checkpoint that `path` means, and the folder of its run."""
    if path.is_file():
        _refuse_pickle(path)
        raise CheckpointError(f"{path} is a file; expected a checkpoint directory with {STATE}")
    parent = path.parent if path.name not in ("", "..") else path.resolve().parent
    for at, run in ((path, parent), (path / "last", path)):
        for directory in (at, _previous(linked(at))):
            if (directory / STATE).exists():
                return directory, run
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint directory")
    for file in sorted(path.iterdir()):
        if file.is_file():
            _refuse_pickle(file)
    raise CheckpointError(f"{path} is no checkpoint: it has no {STATE}")


def _open(directory: Path, run: Path) -> Checkpoint:
    """Open every file of a checkpoint; CheckpointError if it was replaced meanwhile."""
    state = _read_state(directory / STATE)
    files = {path.name: _open_tensors(path) for path in directory.glob("*.safetensors")}
    try:
        vocabulary = Vocabulary.load(directory / VOCABULARY)
    except ValueError as error:
        raise CheckpointError(f"{directory} is damaged: {error}") from error
    if _read_state(directory / STATE) != state:
        raise CheckpointError(f"{directory} is replaced more often than it can be opened")
    return Checkpoint(directory, run, state, vocabulary, files)


def _replace(new: Path, directory: Path) -> None:
    """Rename the complete, flushed directory `new` to `directory`.

    A directory that is not empty cannot be renamed over: between the two renames the previous
    checkpoint is whole under its other name, where `open_checkpoint` and `tidy` look for it.
    """
    _flush(new)
    if directory.exists():
        directory.rename(_previous(directory))
    new.rename(directory)
    _flush(directory.parent)
    shutil.rmtree(_previous(directory), ignore_errors=True)


def _write_shared(
    new: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    vocabulary: Vocabulary,
    config: RunConfig,
    state: Mapping[str, Any],
    world_size: int,
) -> None:
    tensors, aliases = untied(model.state_dict())
    _write_tensors(new / MODEL, tensors)
    _write_tensors(new / OPTIMIZER, optimizer_tensors(model, optimizer))
    heading = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "world_size": world_size,
        "config": to_dict(config),
        "aliases": aliases,
    }
    _write_readable(new, vocabulary, heading | dict(state))


def _write_readable(new: Path, vocabulary: Vocabulary, state: Mapping[str, Any]) -> None:
    vocabulary.save(new / VOCABULARY)
    _flush(new / VOCABULARY)
    (new / STATE).write_text(to_json(dict(state), indent=1) + "\n", encoding="utf-8")
    _flush(new / STATE)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        _refuse_pickle(path)
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of another format; expected {FORMAT!r}")
    if (version := state.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this package reads {FORMAT_VERSION}"
        )
    needed = ("step", "config", "aliases", "world_size")
    if missing := [name for name in needed if name not in state]:
        raise CheckpointError(f"{path} is damaged: it has no {missing[0]!r}")
    return state


def _open_tensors(path: Path) -> safe_open | CheckpointError:
    """Map a file of tensors; an error is returned, since not every reader needs every file."""
    try:
        _refuse_pickle(path)
        return safe_open(path, framework="pt")
    except CheckpointError as error:
        return error
    except SafetensorError as error:
        return CheckpointError(f"{path} is damaged: {error}")


def _refuse_pickle(path: Path) -> None:
    """CheckpointError if the file is a pickle, or a zip archive as torch.save writes it."""
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file is the length of its header in 8 bytes, then the header's brace.
    pickled = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if start[:4] == b"PK\x03\x04" or (pickled and start[8:] != b"{"):
        raise CheckpointError(
            f"{path} is a pickle, which is never loaded here (it can run any code); "
            "expected a checkpoint directory of safetensors"
        )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a new safetensors file with the mode that any new file has here."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # as the umask or the folder's access list sets it
    safetensors.torch.save_file(contiguous, path)  # replaces the file by one of mode 0600
    path.chmod(mode)
    _flush(path)


def _flush(path: Path) -> None:
    """Have a file's, or a directory's, contents on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new(directory: Path) -> Path:
    return directory.parent / f"{directory.name}.new"


def _previous(directory: Path) -> Path:
    return directory.parent / f"{directory.name}.previous"


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"
