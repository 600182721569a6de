"""The check of one input: it is read, or refused by a documented error that names the file."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

MOST_CPU_SECONDS = 10.0
# One chunk of text is 4 MiB; its words as Python objects need 30 times as much.
MOST_BYTES = 256 << 20
BYTES_PER_BYTE = 40  # of JSON as Python objects
LONGEST_MESSAGE = 2000
PAGE = resource.getpagesize()
STATM = Path("/proc/self/statm")
CLEAR_REFS = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # Linux: sets the peak to the present resident set


class Format(Protocol):
    """A kind of file that the project reads.

    Attributes:
        name: in commands and reports.
        errors: the documented errors of its readers.
    """

    name: str
    errors: tuple[type[BaseException], ...]

    def seeds(self) -> list[bytes]:
        """Inputs without damage: a byte that selects a file, then the content of this file."""
        ...

    def refused(self, data: bytes) -> bool:
        """Whether an input of `seeds` is of a kind that the project refuses on purpose."""
        ...

    def read(self, data: bytes) -> None:
        """Read an input with everything that a user's command would do with it."""
        ...

    def names(self, data: bytes, message: str) -> bool:
        """Whether an error's message names the file of this input."""
        ...


@dataclass(frozen=True)
class Fault:
    """An input that was neither read nor refused as documented.

    Attributes:
        reason: one sentence.
        place: identifies the cause: the same for all inputs that fail there.
        detail: the traceback.
    """

    reason: str
    place: str
    detail: str


class TooSlowError(BaseException):
    """The input took more processor time than allowed."""


def check(form: Format, data: bytes) -> Fault | None:
    """Read one input; None if it was read or refused as documented."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(_FORGET_PEAK)
    before = int(STATM.read_text().split()[1]) * PAGE
    fault = _attempt(form, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit = MOST_BYTES + BYTES_PER_BYTE * len(data)
    if peak - before > limit and fault is None:
        reason = f"{(peak - before) >> 20} MiB for an input of {len(data):,} bytes"
        return Fault(reason, "memory", "")
    return fault


def _attempt(form: Format, data: bytes) -> Fault | None:
    try:
        with _limited():
            form.read(data)
    except form.errors as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE:
            return _fault(error, f"a message of {len(message):,} characters")
        if not form.names(data, message):
            return _fault(error, f"the message does not name the file: {message}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever else is raised is a fault
        return _fault(error, f"{type(error).__name__}: {str(error)[:LONGEST_MESSAGE]}")
    return None


def _fault(error: BaseException, reason: str) -> Fault:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "transformer_xl" in f.filename] or list(frames)
    place = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].name}"
    return Fault(reason, place, "".join(traceback.format_exception(error))[-8000:])


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise TooSlowError in a block that takes too much processor time, in all threads together."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"more than {MOST_CPU_SECONDS} s of processor time")

    handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def keep(fault: Fault, data: bytes, folder: Path) -> bool:
    """Write the input and the report of a fault; False if one of the same place exists."""
    digest = hashlib.sha256(fault.place.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"{digest}.txt"
    if report.exists():
        return False
    (folder / f"{digest}.input").write_bytes(data)
    report.write_text(f"{fault.place}\n{fault.reason}\n\n{fault.detail}", encoding="utf-8")
    return True
