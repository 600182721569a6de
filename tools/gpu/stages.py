"""The stages of `make gpu`, their shares of the budget, and the context that each one receives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class UnavailableError(Exception):
    """This machine cannot run the stage; the message is the reason. Not a failure of a kernel."""


@dataclasses.dataclass
class Context:
    """The interface between the runner and a stage.

    Attributes:
        results: this stage's part of the JSON. `results["summary"]`, a list of lines, is printed
            after the verdict if the stage sets it; `results["verified"]`, a dict from the hash of
            a kernel to its name, lists kernels that passed and need no self-test on this device.
        save: writes `results` to the JSON; call it after each finding.
        seconds_left: seconds until this stage's share of the budget ends.
        device: the GPU; in a rehearsal the CPU, on which a stage runs the same code at tiny shapes.
        ceilings: "copy_bytes_per_second" and "gemm_flop_per_second"; empty if not measured.
    """

    results: dict[str, Any]
    save: Callable[[], None]
    seconds_left: Callable[[], float]
    device: torch.device
    ceilings: Mapping[str, float]
