"""What `patch`, `unpatch` and `report` return: one entry for each module that was looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One module of a model, or one class of a family.

    Args:
        name: of the module in its model, or of the class with its Python module.
        class_name: of the module.
        family: whose adapter knows the class.
        patched: True where the kernels compute it.
        reason: why it was left alone; empty where it is patched.
        fallbacks: number of calls that ran the original code, by reason.
    """

    name: str
    class_name: str
    family: str
    patched: bool
    reason: str
    fallbacks: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """The entries; `str` prints them as lines."""

    entries: tuple[Entry, ...]

    @property
    def patched(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.patched)

    @property
    def left_alone(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.patched)

    @property
    def fallbacks(self) -> int:
        """Number of calls that ran the original code."""
        return sum(sum(entry.fallbacks.values()) for entry in self.entries)

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} patched, {len(self.left_alone)} left alone"]
        for entry in self.entries:
            state = "patched" if entry.patched else f"left alone: {entry.reason}"
            lines.append(f"{entry.name or '(the model itself)'} ({entry.class_name}): {state}")
            lines += [
                f"    {n} calls ran the original code: {why}" for why, n in entry.fallbacks.items()
            ]
        return "\n".join(lines)
