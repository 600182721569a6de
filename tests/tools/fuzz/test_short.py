"""A short, deterministic fuzz of every file format; `make fuzz` is the long one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

from tools.fuzz import __main__ as command
from tools.fuzz import oracle
from tools.fuzz.formats import FORMATS
from tools.fuzz.mutate import mutate

# Inputs of each format in this test: all formats together take about 4 s of processor time.
TRUNCATIONS, MUTATIONS = 24, 60
SLOW = {"checkpoint": 5, "trainer": 4}  # these build and run a model for each input


@pytest.fixture(autouse=True)
def warnings_of_records_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def test_the_command_knows_every_format() -> None:
    assert set(command.NAMES) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_every_input_is_read_or_refused_as_documented(name: str, tmp_path: Path) -> None:
    form = FORMATS[name](tmp_path)
    seeds, share = form.seeds(), SLOW.get(name, 1)
    for seed in seeds:
        try:
            form.read(seed)
            assert not form.refused(seed)
        except form.errors:
            assert form.refused(seed), f"{name}: a valid file is refused: {seed[:60]!r}"
    rng = random.Random(name)
    inputs = [seed[: rng.randrange(len(seed))] for seed in seeds for _ in range(2)]
    inputs += [b"\0", *(seed[:1] for seed in seeds)]
    for seed in rng.choices(seeds, k=TRUNCATIONS // share):
        inputs.append(seed[: rng.randrange(len(seed))])
    inputs += [mutate(rng.choice(seeds), rng) for _ in range(MUTATIONS // share)]
    for data in inputs:
        fault = oracle.check(form, data)
        assert fault is None, f"{name}: {fault.reason}\n{fault.detail}\n{data!r}"


class _Broken:
    """A reader with a fault for each first byte of its input."""

    name = "broken"
    errors = (ValueError,)

    def seeds(self) -> list[bytes]:
        return [b"0"]

    def refused(self, data: bytes) -> bool:
        return False

    def names(self, data: bytes, message: str) -> bool:
        return "file" in message

    def read(self, data: bytes) -> None:
        if data == b"1":
            raise KeyError(data)
        if data == b"2":
            raise ValueError("something is wrong")
        if data == b"3":
            raise ValueError("file" + "x" * 10_000)
        if data == b"4":
            bytearray(b"x") * (700 << 20)
        if data == b"5":
            while True:
                pass
        if data == b"6":
            raise ValueError("the file is damaged")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"0", None),
        (b"1", "KeyError"),
        (b"2", "does not name the file"),
        (b"3", "a message of 10,004 characters"),
        (b"4", "MiB for an input of 1 bytes"),
        (b"5", "TooSlowError"),
        (b"6", None),
    ],
)
def test_the_oracle_finds_each_kind_of_fault(
    data: bytes, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "MOST_CPU_SECONDS", 1.0)
    fault = oracle.check(_Broken(), data)
    assert (fault is None) == (reason is None)
    assert reason is None or reason in fault.reason
