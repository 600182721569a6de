"""Long calls into compiled libraries that signals can interrupt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 0.2  # a signal that another thread receives does not wake the main thread


def interruptible(consume: Callable[[Iterator[Item]], Result], items: Iterable[Item]) -> Result:
    """Return `consume(iter(items))`, computed in another thread.

    Python runs signal handlers in the main thread between two of its own instructions, so that a
    compiled function called there delays them for as long as it computes. Here the main thread only
    waits. If a handler raises, `consume` is abandoned: it is given no further item, and the thread
    does not keep the process alive.
    """
    abandoned = threading.Event()
    outcome: Future[Result] = Future()

    def supplied() -> Iterator[Item]:
        for item in items:
            if abandoned.is_set():
                raise RuntimeError("abandoned")
            yield item

    def work() -> None:
        try:
            outcome.set_result(consume(supplied()))
        except BaseException as error:  # raised again in the thread that waits
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while not outcome.done():
            wait([outcome], timeout=POLL_SECONDS)
        return outcome.result()
    finally:
        abandoned.set()
