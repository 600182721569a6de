"""The measuring itself: slow rounds are dropped and replaced, ratios are formed inside a round."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import measure
from benchmarks.measure import Quartiles, Round


class ScriptedProbe:
    """A probe whose rates are written down; the last one stays."""

    def __init__(self, *rates, best=None):
        self._rates = itertools.chain(rates, itertools.repeat(rates[-1]))
        self.best = max(rates) if best is None else best

    def rate(self):
        rate = next(self._rates)
        self.best = max(self.best, rate)
        return rate


def scripted(*seconds):
    """A contender that takes the given seconds; the last one stays."""
    return itertools.chain(seconds, itertools.repeat(seconds[-1])).__next__


def test_quartiles_interpolate():
    assert Quartiles.of([4, 1, 3, 2]) == Quartiles(1.75, 2.5, 3.25)
    assert Quartiles.of([5, 1, 3]) == Quartiles(2, 3, 4)
    assert Quartiles.of([7]) == Quartiles(7, 7, 7)


def test_rounds_under_80_percent_of_the_best_probe_are_not_quiet():
    rounds = [Round(rate, (1.0,)) for rate in (100, 79, 80, 125, 99)]
    assert [taken.probe for taken in measure.quiet(rounds, 100)] == [100, 80, 125, 99]
    assert [taken.probe for taken in measure.quiet(rounds, 125)] == [100, 125]


def test_slow_rounds_are_replaced_until_enough_are_quiet():
    probe = ScriptedProbe(100, 20, 30, 100)
    rounds = measure.take_rounds([scripted(1.0)], probe, wanted=5, sample_seconds=0)
    assert [taken.probe for taken in rounds.kept] == [100] * 5
    assert rounds.dropped == 2
    assert rounds.quiet


def test_a_later_better_probe_drops_earlier_rounds():
    probe = ScriptedProbe(50, 50, 100)
    rounds = measure.take_rounds([scripted(1.0)], probe, wanted=3, sample_seconds=0)
    assert [taken.probe for taken in rounds.kept] == [100] * 3
    assert rounds.dropped == 2


def test_on_a_machine_that_stays_slow_the_best_rounds_count_and_are_marked():
    probe = ScriptedProbe(10, 30, 20, 50, 10, best=100)
    rounds = measure.take_rounds([scripted(1.0)], probe, wanted=3, sample_seconds=0)
    assert [taken.probe for taken in rounds.kept] == [20, 30, 50]
    assert rounds.dropped == measure.MOST_ROUNDS * 3 - 3
    assert not rounds.quiet


def test_ratio_is_the_median_of_the_pairs_ratios():
    # The first two runs of each are warm-up.
    ours, peer = scripted(9, 9, 1, 2, 4), scripted(9, 9, 2, 6, 20)
    found = measure.compare(ours, peer, ScriptedProbe(1), wanted=3, sample_seconds=0)
    assert found.ratio == Quartiles.of([2, 3, 5])
    assert found.ours_seconds.median == 2
    assert found.peer_seconds.median == 6
    assert (found.pairs, found.dropped, found.quiet) == (3, 0, True)


def test_contenders_swap_their_order_every_round():
    order = []

    def contender(name):
        return lambda: order.append(name) or 1.0

    contenders = [contender("a"), contender("b")]
    measure.take_rounds(contenders, ScriptedProbe(1), wanted=3, sample_seconds=0)
    assert "".join(order[4:]) == "abbaab"


@pytest.mark.parametrize(("seconds", "rounds"), [(1, 7), (20, 3), (67, 1), (500, 1)])
def test_long_work_is_taken_less_often(seconds, rounds):
    contenders = [scripted(seconds), scripted(seconds)]
    assert len(measure.take_rounds(contenders, ScriptedProbe(1), wanted=7).kept) == rounds


def test_short_work_is_repeated_and_its_median_taken():
    assert measure.sample(scripted(5, 1, 1, 1, 9), min_seconds=8) == 1
    assert measure.sample(scripted(5, 1), min_seconds=0) == 5


def test_probe_knows_its_best():
    probe = measure.Probe(size=64)
    rates = [probe.rate() for _ in range(5)]
    assert min(rates) > 0
    assert probe.best >= max(rates)
