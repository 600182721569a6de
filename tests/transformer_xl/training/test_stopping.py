"""Signals as requests to stop: when they are noticed, and what they leave alone."""

from __future__ import annotations

import signal
import threading

import pytest

from transformer_xl.training import stopping
from transformer_xl.training.stopping import SIGNALS, Stopped, StopRequests

EVERY = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@EVERY
def test_a_signal_is_a_request_that_polling_finds(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequests() as stops:
        assert not stops.poll()
        stops.check()
        signal.raise_signal(number)
        assert stops.poll()
        with pytest.raises(Stopped, match=f"stopped by {number.name}"):
            stops.check()
    assert signal.getsignal(number) == before


@EVERY
def test_work_that_may_be_abandoned_is_abandoned_at_once(number: signal.Signals) -> None:
    with StopRequests() as stops:
        with pytest.raises(Stopped) as caught, stops.at_once():
            signal.raise_signal(number)
        assert caught.value.number is number
        with pytest.raises(Stopped), stops.at_once():
            pytest.fail("work began after the request")


def test_a_request_before_the_work_prevents_it() -> None:
    with StopRequests() as stops:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), stops.at_once():
            pytest.fail("work began after the request")


def test_a_second_signal_acts_as_it_would_without_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequests() as stops:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun repeats what the terminal has sent
        assert stops.poll()
        monkeypatch.setattr(stopping, "REPEATED_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with StopRequests() as stops:
            signal.raise_signal(signal.SIGHUP)
            assert not stops.poll()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_requests_nest() -> None:
    with StopRequests() as outer, outer.at_once():
        with StopRequests() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner.poll()
        assert not outer.poll()


def test_a_request_to_another_process_counts() -> None:
    with StopRequests(agree=lambda received: True) as stops:
        assert stops.poll()
        with pytest.raises(Stopped) as caught:
            stops.check()
    assert caught.value.number is None


def test_other_threads_receive_no_requests() -> None:
    found = []

    def work() -> None:
        with StopRequests() as stops, stops.at_once():
            found.append(stops.poll())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
