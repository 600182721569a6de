"""The benchmark cases: what runs, beside which peers, and what proves its result right."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from benchmarks.measure import Timed

OURS = "ours"


class PeerUnavailableError(RuntimeError):
    """A peer that cannot run here; the message says why."""


class WrongResultError(AssertionError):
    """A contender computes something else than the case asks for: its speed means nothing."""


class Case(Protocol):
    """One thing to time. Contenders are made anew by each call and keep no state in the case.

    Attributes:
        name: unique, `<op or model>/<shape>/<dtype>/<pass>`.
        dtype: of the inputs, or of autocast.
        device: "cpu" or "cuda".
        peers: names of the contenders beside `OURS`, all computing the same.
        yardsticks: names of contenders that compute something else, of the same size.
        in_process: names of the contenders whose memory this process can measure.
        flop: useful floating-point operations of one run; None where they are not counted.
        bytes_read: bytes of one run if the memory's bandwidth limits it; None for other work.
        tokens: tokens of one run; None where the unit is not a token.
    """

    name: str
    dtype: torch.dtype
    device: str
    peers: tuple[str, ...]
    yardsticks: tuple[str, ...]
    in_process: tuple[str, ...]
    flop: int | None
    bytes_read: int | None
    tokens: int | None

    def contender(self, name: str) -> AbstractContextManager[Timed]:
        """What does the work once, ready inside a `with`. Raises PeerUnavailableError."""

    def check(self, name: str) -> None:
        """Raise WrongResultError unless the contender's result is right."""

    def tiny(self) -> Case:
        """The same kind of work, small enough to load every library with."""
