"""Classes of other libraries, patched by `transformer_xl.integrations` (ours) and unpatched."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import room
from benchmarks.cases import OURS, WrongResultError
from benchmarks.measure import Timed, stopwatch
from transformer_xl.integrations import patch

HF = "hf-sdpa"  # the unpatched class with attn_implementation="sdpa"
CHECKED_ROWS = 32  # queries whose attention is compared with its formula


class DropInCase:
    """A float32 call of a class on the CPU. Subclasses name the contenders and make their runs."""

    dtype = torch.float32
    device = "cpu"
    direction: str = "forward"
    peers: tuple[str, ...] = (HF,)
    yardsticks: tuple[str, ...] = ()
    in_process: tuple[str, ...] = (OURS, HF)
    flop: int | None = None
    bytes_read: int | None = None
    tokens: int | None = None

    @property
    def name(self) -> str:
        raise NotImplementedError

    def run(self, name: str) -> Callable[[], object]:
        """One run of a contender with its inputs."""
        raise NotImplementedError

    def n_bytes(self, name: str) -> int:
        """An estimate of a contender's peak, weights included."""
        raise NotImplementedError

    def check_result(self, name: str) -> None:
        """Raise WrongResultError unless the contender's result is right."""
        raise NotImplementedError

    def tiny(self) -> DropInCase:
        raise NotImplementedError

    def check(self, name: str) -> None:
        room.require(self.n_bytes(name))
        self.check_result(name)

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        room.require(self.n_bytes(name))
        yield stopwatch(self.run(name))

    def compare(self, name: str, actual: Tensor, expected: Tensor, allowed: float) -> None:
        """Raises WrongResultError unless the relative error, by Frobenius norm, is allowed."""
        error = float((actual.double() - expected).norm() / expected.norm())
        if not error <= allowed:  # NaN is an error too
            raise WrongResultError(
                f"{self.name}: {name} is off by {error:.1e} of its norm; {allowed:.0e} is allowed"
            )


def patched_if(is_patched: bool, module: Any) -> Any:
    """The module, patched in place if requested; ValueError if nothing of it could be patched."""
    if is_patched and not patch(module).patched:
        raise ValueError(f"no module of {type(module).__name__} was patched")
    return module


def without_gradients(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(functools.wraps(run)(lambda: run()))


def some_rows(T: int) -> Tensor:
    """Queries from the first to the last one, evenly spaced."""
    return torch.linspace(0, T - 1, min(T, CHECKED_ROWS)).long()


def is_available() -> bool:
    """Whether this environment has the library of the classes."""
    return importlib.util.find_spec("transformers") is not None
