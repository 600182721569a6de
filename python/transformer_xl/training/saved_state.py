"""Checks of the training state that a checkpoint holds, before any of it is restored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_xl.checkpoint import STATE, Checkpoint, CheckpointError
from transformer_xl.checkpoint_state import check_entry
from transformer_xl.data.files import is_int
from transformer_xl.messages import brief

LOSS = "loss_sum"


def check_training_state(saved: Checkpoint) -> None:
    """Raise CheckpointError, naming `state.json`, for an entry that no training wrote."""
    path, state = saved.path / STATE, saved.state
    most = saved.step

    def counted(value: Any) -> bool:
        return is_int(value, at_most=most)

    check_entry(path, state, "batch_chunk", "1 or more", lambda value: is_int(value, at_least=1))
    check_entry(path, state, "loss_steps", f"an integer in [0, {most}]", counted)
    check_entry(path, state, "best_loss", "a loss or null", _is_loss)
    check_entry(path, state, "data", "a data position", lambda value: isinstance(value, dict))
    if "validation_due" in state:
        check_entry(path, state, "validation_due", "true or false", _is_bool)
    check_entry(path, state, "schedule", "its fields", lambda value: isinstance(value, dict))
    check_entry(path, state["schedule"], "best", "a loss or null", _is_loss)
    for name in ("not_better", "decays"):
        check_entry(path, state["schedule"], name, f"an integer in [0, {most}]", counted)


def check_rank_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    memories: Sequence[tuple[int, int, int]],
    rng_devices: Sequence[str],
) -> None:
    """Raise CheckpointError, naming the file, for tensors that do not fit this process.

    Args:
        tensors: the content of the file `path`.
        memories: layers, rows and width of the memory of each chunk of the batch.
        rng_devices: the devices whose random-number states are needed.
    """
    _check(path, tensors, LOSS, torch.float64, [])
    for device in rng_devices:
        name = f"rng.{device}"
        _check(path, tensors, name, torch.uint8, [None])
        try:
            torch.Generator(device).set_state(tensors[name])
        except RuntimeError as error:
            raise _damaged(path, f"{name}: {brief(error)}") from error
    for i, (n_layer, rows, width) in enumerate(memories):
        hidden, start = f"memory.{i}.hidden", f"memory.{i}.start"
        if hidden not in tensors and start not in tensors:
            continue  # saved before the first step
        _check(path, tensors, hidden, None, [n_layer, rows, None, width])
        _check(path, tensors, start, torch.int64, [rows])
        length, first = tensors[hidden].shape[2], tensors[start]
        if bool(((first < 0) | (first > length)).any()):
            raise _damaged(path, f"{start}: expected positions in [0, {length}]")


def _check(
    path: Path,
    tensors: Mapping[str, Tensor],
    name: str,
    dtype: torch.dtype | None,
    shape: Sequence[int | None],
) -> None:
    """Check one tensor; dtype None is any floating point, a size None is any size."""
    if name not in tensors:
        raise _damaged(path, f"it has no {name}")
    tensor = tensors[name]
    sizes = list(tensor.shape)
    fits = len(sizes) == len(shape) and all(
        expected in (None, size) for size, expected in zip(sizes, shape, strict=True)
    )
    typed = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if not (fits and typed):
        kind = "floating point" if dtype is None else str(dtype)
        expected = [("any" if size is None else size) for size in shape]
        raise _damaged(
            path,
            f"{name}: expected {kind} {expected}, found {tensor.dtype} {sizes[:8]}",
        )


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}")


def _is_loss(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < math.inf)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)
