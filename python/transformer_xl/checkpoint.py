"""Checkpoints: a directory of safetensors and JSON that is replaced as a whole or not at all.

    model.safetensors       every parameter and buffer once; a tied tensor's other names are in JSON
    optimizer.safetensors   the optimizer's tensors, `<parameter name>|<key>`
    rank-N.safetensors      one per process: its memory, its random-number states
    vocab.json              the vocabulary: a checkpoint can write text without its corpus
    state.json              format, config, step, schedule, data position, aliases, versions

Nothing here is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from transformer_xl.config import ModelConfig, RunConfig, from_dict, to_dict
from transformer_xl.data import Vocabulary

FORMAT = "transformer-xl checkpoint"
FORMAT_VERSION = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
VOCABULARY = "vocab.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another kind, or that could not be saved."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, its state read, its tensors not yet.

    path: the directory.
    state: what `state.json` holds; beside the entries named above, everything given to `save`.
    """

    path: Path
    state: Mapping[str, Any]

    @property
    def config(self) -> RunConfig:
        """The run that wrote it."""
        return from_dict(self.state["config"])

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self.state["step"])

    @property
    def vocabulary(self) -> Path:
        """The JSON file of its vocabulary."""
        return self.path / VOCABULARY

    def load_model(self, model: nn.Module) -> None:
        """Copy the weights into `model`.

        Raises:
            CheckpointError: weights of another model, or weights that are not finite.
        """
        tensors = _read_tensors(self.path / MODEL)
        try:
            tensors |= {alias: tensors[name] for alias, name in self.state["aliases"].items()}
        except KeyError as error:
            raise CheckpointError(f"{self.path / MODEL} is damaged: no tensor {error}") from None
        _check_same_model(self.path, tensors, model.state_dict())
        if (name := first_not_finite(tensors)) is not None:
            raise CheckpointError(
                f"{self.path} holds a diverged model: its weight {name} is not finite; "
                "use an earlier checkpoint"
            )
        model.load_state_dict(tensors)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore the optimizer's state of each of `model`'s parameters."""
        per_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in _read_tensors(self.path / OPTIMIZER).items():
            name, _, entry = key.partition("|")
            per_name.setdefault(name, {})[entry] = tensor
        names = _parameter_names(model, optimizer)
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
        return _read_tensors(self.path / _rank_file(rank))


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
    """Write a checkpoint beside `directory` and put it in its place.

    A kill or a full disk at any moment leaves the previous checkpoint whole. All processes call
    this together; process 0 writes what they share.

    Args:
        state: JSON values: at least "step"; returned by `Checkpoint.state`.
        rank_tensors: what this process alone has.
        wait: a barrier between the processes.

    Raises:
        CheckpointError: the disk is full or the place not writable; the last checkpoint stays.
    """
    new = directory.with_name(directory.name + ".new")
    try:
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
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        kept = f"; the last checkpoint, {directory}, stays" if directory.exists() else ""
        raise CheckpointError(f"checkpoint not saved: {error}{kept}") from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Find and check a checkpoint: the directory itself, or a run's, whose `last` is then meant.

    Raises:
        CheckpointError: nothing there, a pickle, another format or a damaged one.
    """
    if path.is_file():
        _refuse_pickle(path)
        raise CheckpointError(f"{path} is a file; expected a checkpoint directory with {STATE}")
    candidates = (path, _previous(path), path / "last", _previous(path / "last"))
    directory = next((at for at in candidates if (at / STATE).exists()), None)
    if directory is None:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; expected a checkpoint directory")
        for file in sorted(path.iterdir()):
            if file.is_file():
                _refuse_pickle(file)
        raise CheckpointError(f"{path} is no checkpoint: it has no {STATE}")
    return Checkpoint(directory, _read_state(directory / STATE))


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or an infinity; None if all are finite."""
    return next((name for name, t in tensors.items() if not bool(t.isfinite().all())), None)


def check_model(checkpoint: Checkpoint, expected: ModelConfig) -> None:
    """Raise CheckpointError, naming the fields, if the checkpoint is of another model."""
    theirs, ours = to_dict(checkpoint.config.model), to_dict(expected)
    differing = [f"{k} {theirs[k]} there, {ours[k]} here" for k in ours if theirs[k] != ours[k]]
    if differing:
        raise CheckpointError(f"{checkpoint.path} is of another model: {'; '.join(differing)}")


def tidy(directory: Path) -> None:
    """Remove what a killed `save` left beside `directory`, putting back what it had moved away."""
    shutil.rmtree(directory.with_name(directory.name + ".new"), ignore_errors=True)
    previous = _previous(directory)
    if previous.exists() and not directory.exists():
        previous.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


def _replace(new: Path, directory: Path) -> None:
    """Put the whole, flushed directory `new` in the place of `directory`.

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
    tensors, aliases = _untied(model.state_dict())
    _write_tensors(new / MODEL, tensors)
    _write_tensors(new / OPTIMIZER, optimizer_tensors(model, optimizer))
    vocabulary.save(new / VOCABULARY)
    _flush(new / VOCABULARY)
    heading = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "world_size": world_size,
        "config": to_dict(config),
        "aliases": aliases,
    }
    text = json.dumps(heading | dict(state), indent=1)
    (new / STATE).write_text(text + "\n", encoding="utf-8")
    _flush(new / STATE)


def _untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under its first name, and the other names it goes by."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state of each parameter, by `<parameter name>|<key>`."""
    names = _parameter_names(model, optimizer)
    return {
        f"{names[i]}|{key}": tensor
        for i, entries in optimizer.state_dict()["state"].items()
        for key, tensor in entries.items()
    }


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in its own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _check_same_model(path: Path, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    if missing := ours.keys() - theirs.keys():
        raise CheckpointError(f"{path} is of another model: it has no {min(missing)!r}")
    if extra := theirs.keys() - ours.keys():
        raise CheckpointError(f"{path} is of another model: {min(extra)!r} is not in this one")
    for name, tensor in ours.items():
        if theirs[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path} is of another model: {name} is {list(theirs[name].shape)} there, "
                f"{list(tensor.shape)} here"
            )


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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors in memory of their own, aligned like any other tensor's: products of the
    same numbers then give the same bits before and after."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is damaged: it has no {path.name}")
    _refuse_pickle(path)
    try:
        return {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


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


def _previous(directory: Path) -> Path:
    return directory.with_name(directory.name + ".previous")


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.safetensors"
