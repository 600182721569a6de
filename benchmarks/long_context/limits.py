"""The prediction rule: when the next length would take too much time or memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

GIB = 2**30


class Limits(NamedTuple):
    """The most seconds of one run, and GiB that the machine must keep free."""

    seconds: float
    reserve_gib: float


class Measurement(NamedTuple):
    """One run of one side.

    Attributes:
        length: in the workload's unit.
        peak_gib: growth of the resident set from just before the run to its highest point.
        start_gib: the resident set just before the run: libraries, weights, inputs.
    """

    side: str
    length: float
    seconds: float
    peak_gib: float
    start_gib: float


class Stop(NamedTuple):
    """A length that was not run or not finished, with the reason and the prediction, if any.

    Attributes:
        started: whether it was run, and ended for its time or memory.
    """

    side: str
    length: float
    seconds: float | None
    peak_gib: float | None
    reason: str
    started: bool = False


def predicted(lengths: Sequence[float], values: Sequence[float], length: float) -> float:
    """The value at `length` of a·T + b·T² with a, b >= 0 through the last two values.

    A single value is taken for b·T². The result lies between linear and quadratic growth from the
    last value.
    """
    last, value = lengths[-1], values[-1]
    linear, quadratic = value * (length / last), value * (length / last) ** 2
    if len(values) == 1:
        return quadratic
    b = (value / last - values[-2] / lengths[-2]) / (last - lengths[-2])
    a = value / last - b * last
    return min(max(a * length + b * length**2, linear), quadratic)


def forecast(earlier: Sequence[Measurement], length: float) -> tuple[float, float]:
    """Seconds and growth in GiB at `length`, from the runs of one side at shorter lengths."""
    lengths = [run.length for run in earlier]
    seconds = predicted(lengths, [run.seconds for run in earlier], length)
    return seconds, predicted(lengths, [run.peak_gib for run in earlier], length)


def stop_before(
    length: float, earlier: Sequence[Measurement], limits: Limits, room_gib: float
) -> Stop | None:
    """None if the run of `length` is predicted to stay within the limits.

    Args:
        earlier: the runs of this side, with increasing lengths; without any, nothing is predicted.
        room_gib: the memory that the process may use.
    """
    if not earlier:
        return None
    seconds, peak = forecast(earlier, length)
    need = earlier[-1].start_gib + peak
    reasons = []
    if seconds > limits.seconds:
        reasons.append(f"take {seconds:,.0f} s (limit {limits.seconds:.0f} s)")
    if need > room_gib:
        reasons.append(f"need {need:.0f} GiB ({room_gib:.0f} GiB free)")
    if not reasons:
        return None
    return Stop(earlier[-1].side, length, seconds, peak, "would " + " and ".join(reasons))
