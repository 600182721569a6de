"""Signals interrupt calls that compute outside Python for long."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from transformer_xl.data.interruptible import interruptible


def test_the_result_and_the_errors_are_the_calls_own() -> None:
    assert interruptible(sum, [1, 2, 3]) == 6

    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("not UTF-8")

    with pytest.raises(ValueError, match="not UTF-8"):
        interruptible(sum, broken())


def test_an_interrupted_call_gets_no_further_item() -> None:
    given = []

    def items() -> Iterator[int]:
        while True:
            time.sleep(0.001)
            given.append(0)
            yield 1

    threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        interruptible(sum, items())
    time.sleep(0.1)
    before = len(given)
    time.sleep(0.1)
    assert len(given) == before


PROGRAM = """
import random, signal, string, sys, time
from pathlib import Path
from transformer_xl.data.sources import Piece
from transformer_xl.data.vocabularies import SubwordVocabulary

words = ("".join(random.choices(string.ascii_lowercase, k=12)) for _ in range(100_000))
Path(sys.argv[1]).write_text(" ".join(words))
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.5)
began = time.perf_counter()
try:
    SubwordVocabulary.learn([Piece(Path(sys.argv[1]))], 30_000)
except KeyboardInterrupt:
    print(time.perf_counter() - began)
"""


def test_learning_subwords_is_interrupted(tmp_path: Path) -> None:
    """Merging pairs of these words takes many seconds inside the `tokenizers` library."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "words.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert 0.4 < float(done.stdout) < 3.0  # seconds
