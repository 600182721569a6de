"""Takes all figures of a case: first that results are right, then time, then memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks import device, machine, peak_memory
from benchmarks.cases import OURS, Case
from benchmarks.measure import (
    QUIET,
    Comparison,
    Probe,
    Quartiles,
    Timed,
    compare,
    take_rounds,
)
from benchmarks.room import TooLargeError


class Effort(NamedTuple):
    """How much time to spend: quiet pairs per peer, seconds per sample, memory too or not."""

    pairs: int
    sample_seconds: float
    memory: bool


@dataclasses.dataclass
class Figures:
    """What was found about a case; a part that could not be taken is absent and has a note.

    Attributes:
        seconds: of one run of ours; `quiet`, whether the machine was while they were taken.
        gflops: useful ones, where the case counts them.
        gigabytes_per_second: that ours reads, where the case counts bytes.
        tokens_per_second: where the case has tokens.
        limit: the rate that products of tiles, or reading memory, reached just before ours was
            timed.
        peers, yardsticks: ours beside each.
        peak_mib: growth of the resident set, by contender.
        notes: by contender, why a figure is missing.
        needed_bytes: by contender that was refused, the memory that it would need.
    """

    case: str
    seconds: Quartiles | None = None
    quiet: bool = True
    gflops: float | None = None
    gigabytes_per_second: float | None = None
    tokens_per_second: float | None = None
    limit: machine.Limit | None = None
    peers: dict[str, Comparison] = dataclasses.field(default_factory=dict)
    yardsticks: dict[str, Comparison] = dataclasses.field(default_factory=dict)
    peak_mib: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    needed_bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def fastest_peer(self) -> str | None:
        """The peer over which our gain is smallest."""
        return min(self.peers, key=lambda name: self.peers[name].ratio.median, default=None)

    @property
    def share_of_limit(self) -> float | None:
        """The useful rate over the limit's."""
        rate = self.gigabytes_per_second if self.gflops is None else self.gflops
        return None if rate is None or self.limit is None else rate / self.limit.rate


def take(
    case: Case,
    probe: Probe,
    effort: Effort,
    others: Sequence[str] | None = None,
    figures: Figures | None = None,
) -> Figures:
    """All figures of a timed case. A wrong result of ours leaves only a note, and no speed.

    Args:
        others: the contenders to compare with ours; all if None.
        figures: receives the figures; those of an earlier call for ours are kept.
    """
    figures = figures or Figures(case.name)
    is_new = figures.seconds is None
    if is_new and not figures.notes:
        with noting(figures, OURS):
            case.check(OURS)
    if OURS in figures.notes:
        return figures
    with noting(figures, OURS), case.contender(OURS) as ours:
        if is_new:
            _take_speed(case, ours, probe, effort, figures)
        for name in (*case.peers, *case.yardsticks) if others is None else others:
            taken = figures.peers if name in case.peers else figures.yardsticks
            with noting(figures, name):
                case.check(name)
                with case.contender(name) as peer:
                    taken[name] = compare(
                        ours,
                        peer,
                        probe,
                        wanted=effort.pairs,
                        sample_seconds=effort.sample_seconds,
                    )
    if effort.memory:
        possible = tuple(name for name in case.in_process if name not in figures.notes)
        take_memory(case, possible, figures)
    return figures


def take_once(case: Case, probe: Probe) -> Figures:
    """Time and peak memory of one run of ours in a process of its own, for runs of minutes.

    The run counts as quiet if the machine was quiet just before and just after it.
    """
    figures = Figures(case.name)
    with noting(figures, OURS):
        case.check(OURS)
        before = probe.rate()
        peak = peak_memory.in_child(case.name, OURS)
        figures.quiet = min(before, probe.rate()) >= QUIET * probe.best
        figures.seconds, figures.peak_mib[OURS] = Quartiles.of([peak.seconds]), peak.mib
    return figures


def take_memory(case: Case, contenders: tuple[str, ...], figures: Figures) -> None:
    """Peak growth of each contender that runs in a Python process of ours, or on the device."""
    for name in contenders:
        with noting(figures, name):
            if case.device != "cpu":
                with case.contender(name) as run:
                    figures.peak_mib[name] = device.peak_mib(run)
                continue
            figures.peak_mib[name] = peak_memory.in_child(case.name, name).mib


def _take_speed(case: Case, ours: Timed, probe: Probe, effort: Effort, figures: Figures) -> None:
    """Our own seconds and rate, and the limit of the same minute."""
    if case.flop is not None:
        figures.limit = machine.limit(case.dtype, device=case.device)
    elif case.bytes_read is not None:
        figures.limit = machine.read_limit()
    rounds = take_rounds((ours,), probe, wanted=effort.pairs, sample_seconds=effort.sample_seconds)
    figures.seconds, figures.quiet = rounds.seconds(0), rounds.quiet
    if case.flop is not None:
        figures.gflops = case.flop / figures.seconds.median / 1e9
    if case.bytes_read is not None:
        figures.gigabytes_per_second = case.bytes_read / figures.seconds.median / 1e9
    if case.tokens is not None:
        figures.tokens_per_second = case.tokens / figures.seconds.median


@contextlib.contextmanager
def noting(figures: Figures, contender: str) -> Iterator[None]:
    """Turns an error of a contender into a note, of its first line."""
    try:
        yield
    except Exception as error:  # such as Triton's OutOfResources
        figures.notes[contender] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        if isinstance(error, TooLargeError):
            figures.needed_bytes[contender] = error.n_bytes
