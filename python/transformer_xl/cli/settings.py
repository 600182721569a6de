"""Parses the preset and the FIELD=VALUE arguments of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformer_xl.config import ModelConfig, RunConfig, load_preset, override, preset_names


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The preset or None, and the overrides; ValueError for more than one preset."""
    presets = [argument for argument in arguments if "=" not in argument]
    if len(presets) > 1:
        raise ValueError(f"expected one preset, got {', '.join(presets)}; fields are FIELD=VALUE")
    changes = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    return (presets[0] if presets else None), changes


def only_overrides(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """`config` with FIELD=VALUE arguments applied; ValueError for any other argument."""
    preset, changes = split_arguments(arguments)
    if preset is not None:
        raise ValueError(
            f"the checkpoint has its own configuration; expected FIELD=VALUE, got {preset!r}"
        )
    return override(config, changes)


def from_preset(arguments: Sequence[str], model: ModelConfig | None = None) -> RunConfig:
    """The preset, with `model` as its model section if given, and FIELD=VALUE arguments applied."""
    preset, changes = split_arguments(arguments)
    if preset is None:
        raise ValueError(f"name a preset: {', '.join(preset_names())}")
    config = load_preset(preset)
    return override(config if model is None else replace(config, model=model), changes)
