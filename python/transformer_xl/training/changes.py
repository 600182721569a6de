"""Lines that a run prints about the checkpoint that it begins with: the fields that differ."""

from __future__ import annotations

from typing import Any

from transformer_xl.checkpoint import Checkpoint
from transformer_xl.config import ADJUSTABLE, RunConfig
from transformer_xl.config_fields import differences
from transformer_xl.training.schedule import Schedule


def since(saved: Checkpoint, config: RunConfig, schedule: Schedule) -> list[str]:
    """Return a line for each field that resuming `saved` changes, then one for the learning rate.

    Args:
        schedule: the schedule of `config` with the validation results of the checkpoint.
    """
    lines = _lines(differences(saved.config, config))
    earlier = Schedule(saved.config.train)
    earlier.load_state_dict(saved.state["schedule"])
    step = saved.step + 1
    before, after = earlier.at(step), schedule.at(step)
    if before != after:
        lines.append(f"learning rate of step {step:,}: {before:.4g} -> {after:.4g}")
    return lines


def from_weights(saved: Checkpoint, config: RunConfig) -> list[str]:
    """Return the lines that tell which model begins with the weights of `saved`."""
    fields = differences(saved.config.model, config.model)
    adjusted = {f"model.{name}": pair for name, pair in fields.items() if name in ADJUSTABLE}
    return [
        f"weights and model section of {saved.path}; the preset's model section is ignored",
        *_lines(adjusted),
    ]


def _lines(fields: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name}: {before} -> {after}" for name, (before, after) in fields.items()]
