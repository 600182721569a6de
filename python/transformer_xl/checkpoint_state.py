"""The file `state.json` of a checkpoint: its format, and checks of the entries that all have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformer_xl.checkpoint_files import CheckpointError, refuse_pickle
from transformer_xl.config import from_dict
from transformer_xl.data.files import is_int, read_json
from transformer_xl.messages import shortened

FORMAT = "transformer-xl checkpoint"
FORMAT_VERSION = 1


def read_state(path: Path) -> dict[str, Any]:
    """The content of a `state.json`; CheckpointError if it is of another format or damaged."""
    try:
        state = read_json(path)
    except ValueError as error:
        if path.is_file():
            with contextlib.suppress(OSError):
                refuse_pickle(path)
        raise CheckpointError(str(error)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of another format; expected {FORMAT!r}")
    if (version := state.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {shortened(version)}; this package reads {FORMAT_VERSION}"
        )
    _check_state(path, state)
    return state


def _check_state(path: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the entries that every checkpoint has are of their types."""
    check_entry(path, state, "step", "0 or more steps", is_int)
    check_entry(path, state, "world_size", "1 process or more", lambda n: is_int(n, at_least=1))
    check_entry(path, state, "aliases", "names by name", _is_aliases)
    check_entry(path, state, "config", "a configuration", lambda value: isinstance(value, dict))
    try:
        from_dict(state["config"])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its configuration: {error}") from error


def check_entry(
    path: Path, entries: Mapping[str, Any], name: str, expected: str, holds: Callable[[Any], bool]
) -> None:
    """Raise CheckpointError, naming the file, unless an entry of its JSON is there and `holds`."""
    if name not in entries:
        raise CheckpointError(f"{path} is damaged: it has no {name!r}")
    if not holds(entries[name]):
        found = shortened(entries[name])
        raise CheckpointError(f"{path} is damaged: {name}: expected {expected}, found {found}")


def _is_aliases(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())
