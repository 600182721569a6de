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
import platform
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from transformer_xl.checkpoint_files import (
    CheckpointError,
    flush,
    open_tensors,
    previous,
    read_tensors,
    refuse_pickle,
    replace,
    shapes,
    tidy,
    write_tensors,
    written_beside,
)
from transformer_xl.checkpoint_state import FORMAT, FORMAT_VERSION, read_state
from transformer_xl.config import ADJUSTABLE, INITIAL, ModelConfig, RunConfig, from_dict
from transformer_xl.config_fields import differences, to_dict
from transformer_xl.data import Vocabulary
from transformer_xl.data.files import expanded, linked, resolved, to_json
from transformer_xl.messages import brief, shortened
from transformer_xl.model import TransformerXL
from transformer_xl.nn.tensor_names import (
    optimizer_tensors,
    parameter_names,
    shape_difference,
    state_difference,
    untied,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "check_model",
    "open_checkpoint",
    "save",
    "tidy",
]

T = TypeVar("T")

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
VOCABULARY = "vocab.json"
# While a run saves a small model every few ms, about one opening in ten meets a replacement.
OPENINGS = 10


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
        step: int = self.state["step"]
        return step

    def check_sizes(self) -> None:
        """Raise CheckpointError unless the weights and the vocabulary have the configured sizes.

        Nothing is allocated: a configuration may ask for more memory than any machine has.
        """
        config = self.config.model
        found = self._with_aliases(shapes(self.path / MODEL, self._file(MODEL)))
        if config.n_layer > len(found):
            raise CheckpointError(
                f"{self.path} is damaged: its configuration has n_layer {config.n_layer:,}, its "
                f"weights are {len(found):,} tensors"
            )
        try:
            with torch.device("meta"):
                model = TransformerXL(config)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # sizes of 64 bits
            raise CheckpointError(
                f"{self.path} is damaged: no model has its sizes: {brief(error)}"
            ) from error
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if difference := shape_difference(found, expected):
            raise CheckpointError(
                f"{self.path} is damaged: its weights are not of its configuration: {difference}"
            )
        if len(self.vocabulary) != config.vocab_size:
            raise CheckpointError(
                f"{self.path / VOCABULARY} is damaged: expected {config.vocab_size:,} "
                f"{self.vocabulary.symbol}s as its model has, found {len(self.vocabulary):,}"
            )

    def load_model(self, model: nn.Module) -> None:
        """Copy the weights into `model`.

        Raises:
            CheckpointError: weights of another model, or weights that are not finite.
        """
        tensors = self._with_aliases(self._tensors(MODEL))
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if difference := shape_difference(sizes, expected):
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
        """Restore the optimizer's state of each of `model`'s parameters.

        Raises:
            CheckpointError: a state that does not fit its parameter. torch checks no sizes here: a
                fused optimizer would read and write beyond a smaller tensor.
        """
        per_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._tensors(OPTIMIZER).items():
            name, _, entry = key.partition("|")
            per_name.setdefault(name, {})[entry] = tensor
        names = parameter_names(model, optimizer)
        if unknown := set(per_name) - set(names):
            raise CheckpointError(
                f"{self.path / OPTIMIZER} does not fit the model: it has a state of "
                f"{shortened(min(unknown))}, which is no weight"
            )
        if difference := state_difference(per_name, model, optimizer):
            raise CheckpointError(f"{self.path / OPTIMIZER} does not fit the model: {difference}")
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
        return self._tensors(rank_file(rank))

    def copy(self, directory: Path) -> None:
        """Write the same checkpoint to `directory`; raises CheckpointError as `save` does."""
        directory = linked(directory)
        with written_beside(directory) as new:
            tidy(directory)
            new.mkdir(parents=True)
            for name in self.files:
                write_tensors(new / name, self._tensors(name))
            _write_readable(new, self.vocabulary, self.state)
            replace(new, directory)

    def _with_aliases(self, entries: dict[str, T]) -> dict[str, T]:
        """Entries for all tensors of the model, from those of the tensors in its file."""
        try:
            return entries | {alias: entries[name] for alias, name in self.state["aliases"].items()}
        except KeyError as error:
            raise CheckpointError(
                f"{self.path / MODEL} is damaged: no tensor {shortened(error.args[0])}"
            ) from None

    def _file(self, name: str) -> safe_open:
        file = self.files.get(name)
        if file is None:
            raise CheckpointError(f"{self.path} is damaged: it has no {name}")
        if isinstance(file, CheckpointError):
            raise file
        return file

    def _tensors(self, name: str) -> dict[str, Tensor]:
        return read_tensors(self.path / name, self._file(name))


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
    with written_beside(directory) as new:
        if rank == 0:
            tidy(directory)
            new.mkdir(parents=True)
        wait()
        write_tensors(new / rank_file(rank), rank_tensors)
        if rank == 0:
            _write_shared(new, model, optimizer, vocabulary, config, state, world_size)
        wait()
        if rank == 0:
            replace(new, directory)
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


def _found(path: Path) -> tuple[Path, Path]:
    """The directory of the checkpoint that `path` means, and the folder of its run."""
    if path.is_file():
        refuse_pickle(path)
        raise CheckpointError(f"{path} is a file; expected a checkpoint directory with {STATE}")
    parent = path.parent if path.name not in ("", "..") else resolved(path).parent
    for at, run in ((path, parent), (path / "last", path)):
        for directory in (at, previous(linked(at))):
            if (directory / STATE).exists():
                return directory, run
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint directory")
    for file in sorted(path.iterdir()):
        if file.is_file():
            refuse_pickle(file)
    raise CheckpointError(f"{path} is no checkpoint: it has no {STATE}")


def _open(directory: Path, run: Path) -> Checkpoint:
    """Open every file of a checkpoint; CheckpointError if it was replaced meanwhile."""
    state = read_state(directory / STATE)
    files = {path.name: open_tensors(path) for path in directory.glob("*.safetensors")}
    try:
        vocabulary = Vocabulary.load(directory / VOCABULARY)
    except ValueError as error:
        raise CheckpointError(f"{directory} is damaged: {error}") from error
    if read_state(directory / STATE) != state:
        raise CheckpointError(f"{directory} is replaced more often than it can be opened")
    return Checkpoint(directory, run, state, vocabulary, files)


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
    write_tensors(new / MODEL, tensors)
    write_tensors(new / OPTIMIZER, optimizer_tensors(model, optimizer))
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
    flush(new / VOCABULARY)
    (new / STATE).write_text(to_json(dict(state), indent=1) + "\n", encoding="utf-8")
    flush(new / STATE)


def rank_file(rank: int) -> str:
    """The name of the file of tensors of one process."""
    return f"rank-{rank}.safetensors"
