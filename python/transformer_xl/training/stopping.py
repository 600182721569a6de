"""Ctrl-C, SIGTERM and SIGHUP as requests to stop that every phase of a run answers."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# torchrun sends a Ctrl-C on to processes that the terminal has already sent it to.
REPEATED_SECONDS = 1.0


class Stopped(KeyboardInterrupt):
    """Unfinished work was abandoned because a stop was requested.

    number: the signal that requested it; None if only another process received one.
    """

    def __init__(self, number: signal.Signals | None) -> None:
        super().__init__("stopped" if number is None else f"stopped by {number.name}")
        self.number = number


class StopRequests:
    """A context in which the first SIGINT, SIGTERM or SIGHUP requests a stop.

    Work that must be finished first (a step, a checkpoint) is followed by `poll`. Work that may be
    abandoned between two of its parts (validation) calls `check` there. Work that may be abandoned
    anywhere (encoding a corpus) runs in `at_once`.

    A signal that arrives later than REPEATED_SECONDS after the first acts as it would without this
    context. A signal that is ignored (SIGHUP under nohup) stays ignored. Outside the main thread,
    where Python delivers no signals, nothing is ever requested.

    Args:
        agree: whether a request reached any process, given whether one reached this process. All
            processes must call `poll` and `check` equally often.
    """

    def __init__(self, agree: Callable[[bool], bool] = lambda received: received) -> None:
        self._agree = agree
        self._received: signal.Signals | None = None
        self._received_at = 0.0  # seconds, time.monotonic()
        self._raising = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            ignored = (signal.SIG_IGN, None)  # None: a handler that Python cannot restore
            self._previous = {n: h for n, h in handlers.items() if h not in ignored}
            for number in self._previous:
                signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def received(self) -> signal.Signals | None:
        """The signal that requested a stop of this process; None if there was none."""
        return self._received

    def poll(self) -> bool:
        """Whether a stop was requested of any process."""
        return self._agree(self._received is not None)

    def check(self) -> None:
        """Raise `Stopped` if a stop was requested of any process."""
        if self.poll():
            raise Stopped(self._received)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Stopped` inside this block as soon as this process receives a request."""
        self._raising = True
        try:
            if self._received is not None:
                raise Stopped(self._received)
            yield
        finally:
            self._raising = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = signal.Signals(number), now
            if self._raising:
                raise Stopped(self._received)
        elif now > self._received_at + REPEATED_SECONDS:
            signal.signal(number, self._previous[signal.Signals(number)])
            signal.raise_signal(number)
