"""How time is taken: rounds in which the contenders alternate, each behind a probe of the machine.

A shared or throttled machine has slow phases. A short sgemm before each round tells whether it is
in one; such rounds are dropped, and more are taken in their place. Ratios are formed inside a
round, where both sides ran within the same fraction of a second. Where the machine stays slow
the rounds with the best probes are taken, and the figure is marked as not quiet.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

Timed = Callable[[], float]  # does the work once, returns its seconds

WANTED_ROUNDS = 7
MOST_ROUNDS = 4  # times the wanted ones, before giving up waiting for a quiet machine
QUIET = 0.8  # of the best probe of the run
SAMPLE_SECONDS = 0.05  # short work is repeated that long, and its median taken
LONG_SECONDS = 120  # rounds that would take longer together are fewer, at least one


@dataclasses.dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a list of figures."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quartiles:
        """Linear interpolation between the values, ends included; one value is all three."""
        ordered = sorted(values)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0])
        return cls(*statistics.quantiles(ordered, n=4, method="inclusive"))


@dataclasses.dataclass(frozen=True)
class Round:
    """One look at all contenders: the probe before it in GFLOP/s, and each one's seconds."""

    probe: float
    seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The rounds that count, how many others were taken, and whether these were all quiet."""

    kept: list[Round]
    dropped: int
    quiet: bool

    def seconds(self, contender: int) -> Quartiles:
        """Of the contender in that place."""
        return Quartiles.of(taken.seconds[contender] for taken in self.kept)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ours beside one peer; ratios are peer / ours, so above 1 ours is faster."""

    ratio: Quartiles
    ours_seconds: Quartiles
    peer_seconds: Quartiles
    pairs: int
    dropped: int
    quiet: bool


class Probe:
    """A short sgemm, and the best rate it has reached so far in this run."""

    def __init__(self, size: int = 1024) -> None:
        generator = torch.Generator().manual_seed(0)
        self._a = torch.randn(size, size, generator=generator)
        self._out = torch.empty(size, size)
        self._gflop = 2e-9 * size**3
        self.best = 0.0
        for _ in range(3):
            self.rate()

    def rate(self) -> float:
        """GFLOP/s of the machine now: the better of two products."""
        timed = stopwatch(lambda: torch.mm(self._a, self._a, out=self._out))
        rate = self._gflop / min(timed(), timed())
        self.best = max(self.best, rate)
        return rate


class OneProgramAtATime:
    """A probe for `take_rounds`: nothing else runs on a GPU, so that every round counts."""

    best = 1.0

    def rate(self) -> float:
        return 1.0


def stopwatch(work: Callable[[], object]) -> Timed:
    """`work` as something that returns its seconds."""

    def timed() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return timed


def sample(timed: Timed, min_seconds: float = SAMPLE_SECONDS) -> float:
    """Seconds of one run: the median of as many as fill `min_seconds`, at least one."""
    runs = [timed()]
    while sum(runs) < min_seconds:
        runs.append(timed())
    return statistics.median(runs)


def quiet(rounds: Sequence[Round], best_probe: float) -> list[Round]:
    """The rounds whose probe reached `QUIET` of the best."""
    return [taken for taken in rounds if taken.probe >= QUIET * best_probe]


def take_rounds(
    contenders: Sequence[Timed],
    probe: Probe,
    *,
    wanted: int = WANTED_ROUNDS,
    sample_seconds: float = SAMPLE_SECONDS,
) -> Rounds:
    """Take rounds until `wanted` are quiet, or as many as `LONG_SECONDS` have room for if those are
    fewer; `MOST_ROUNDS` times as many at most.

    Every second round runs the contenders in reverse order.
    """
    seconds_each = sum(_warm_up(contender, sample_seconds) for contender in contenders)
    wanted = max(1, min(wanted, int(LONG_SECONDS / seconds_each)))
    rounds: list[Round] = []
    while len(kept := quiet(rounds, probe.best)) < wanted:
        if len(rounds) == MOST_ROUNDS * wanted:
            best = sorted(rounds, key=lambda taken: taken.probe)[-wanted:]
            return Rounds(best, len(rounds) - wanted, quiet=False)
        order = range(len(contenders))[:: -1 if len(rounds) % 2 else 1]
        rate = probe.rate()
        seconds = {i: sample(contenders[i], sample_seconds) for i in order}
        rounds.append(Round(rate, tuple(seconds[i] for i in range(len(contenders)))))
    return Rounds(kept, len(rounds) - wanted, quiet=True)


def _warm_up(contender: Timed, sample_seconds: float) -> float:
    """Let compilers, caches and threads settle; the seconds that a sample then takes."""
    sample(contender, sample_seconds)
    return max(contender(), sample_seconds)


def compare(
    ours: Timed,
    peer: Timed,
    probe: Probe,
    *,
    wanted: int = WANTED_ROUNDS,
    sample_seconds: float = SAMPLE_SECONDS,
) -> Comparison:
    """Ours and the peer, in turns."""
    rounds = take_rounds((ours, peer), probe, wanted=wanted, sample_seconds=sample_seconds)
    return Comparison(
        ratio=Quartiles.of(taken.seconds[1] / taken.seconds[0] for taken in rounds.kept),
        ours_seconds=rounds.seconds(0),
        peer_seconds=rounds.seconds(1),
        pairs=len(rounds.kept),
        dropped=rounds.dropped,
        quiet=rounds.quiet,
    )
