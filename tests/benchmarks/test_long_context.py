"""The demonstration of long inputs: its prediction rule, its JSON, its table and its picture; tiny
models of Hugging Face in processes of their own where transformers is installed."""

from __future__ import annotations

import functools
import io
import json

import pytest
from matplotlib.text import Text
from rich.console import Console

from benchmarks import room
from benchmarks.cases import WrongResultError
from benchmarks.long_context import __main__ as program
from benchmarks.long_context import ladder, limits, picture, worker
from benchmarks.long_context.ladder import Results, climb, compare
from benchmarks.long_context.limits import Limits, Measurement, predicted, stop_before
from benchmarks.long_context.worker import ORIGINAL, PATCHED, SIDES, Answer, OverLimitError
from benchmarks.long_context.workloads import InklingStep, ParakeetEncoder

LIMITS = Limits(seconds=100, reserve_gib=2)
ENOUGH = 1e6  # GiB
MACHINE = {"processor": "a processor", "threads": 2, "torch": "2.13.0"}


def fake(workload, length, side, room_gib):
    """The original needs quadratic time and memory, the patched model almost linear ones."""
    T = length / 2048
    seconds, peak = (6 * T**2, 0.9 * T**2) if side == ORIGINAL else (T + 0.2 * T**2, 0.1 * T)
    return Answer(Measurement(side, length, seconds, peak, 0.5), [5.5, 1.0])


@pytest.fixture(autouse=True)
def free_memory(monkeypatch):
    """24 GiB, of which 20 are free."""
    sizes = {"MemTotal": 24 * 2**30, "MemAvailable": 20 * 2**30}
    monkeypatch.setattr(room, "meminfo", sizes.__getitem__)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The JSON of a run of `fake`."""
    monkeypatch.setattr(ladder.importlib.metadata, "version", lambda name: "5.24.0")
    written = tmp_path / "folder" / "run.json"
    results = climb(InklingStep(), LIMITS, fake)
    ladder.write_json(written, MACHINE, InklingStep(), LIMITS, results)
    return written


@pytest.fixture
def document(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("lengths", [(2, 4, 8), (1, 2, 5), (5, 10, 20)])
@pytest.mark.parametrize("a", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("b", [0.0, 0.25, 2.0])
def test_linear_and_quadratic_growth_is_predicted_exactly(lengths, a, b):
    values = [a * T + b * T**2 for T in lengths]
    assert predicted(lengths[:-1], values[:-1], lengths[-1]) == pytest.approx(values[-1])


def test_a_single_value_grows_quadratically():
    assert predicted([3], [5.0], 6) == 20.0


@pytest.mark.parametrize(("values", "expected"), [([5.0, 6.0], 12.0), ([1.0, 9.0], 36.0)])
def test_noise_gives_no_growth_outside_linear_and_quadratic(values, expected):
    assert predicted([2, 4], values, 8) == pytest.approx(expected)


def test_a_run_is_refused_for_its_time_or_its_memory():
    runs = [fake(None, length, ORIGINAL, 0).measurement for length in (2048, 4096)]
    assert stop_before(8192, runs, Limits(96, 2), room_gib=15) is None
    late = stop_before(8192, runs, Limits(95.9, 2), room_gib=ENOUGH)
    assert (late.side, late.length, late.seconds) == (ORIGINAL, 8192, pytest.approx(96))
    assert late.reason == "would take 96 s (limit 96 s)"
    large = stop_before(8192, runs, Limits(96, 2), room_gib=14.8)
    assert large.peak_gib == pytest.approx(14.4)
    assert large.reason == "would need 15 GiB (15 GiB free)"
    both = stop_before(8192, runs, Limits(50, 2), room_gib=10)
    assert both.reason == "would take 96 s (limit 50 s) and need 15 GiB (10 GiB free)"


def test_the_first_run_is_never_refused():
    assert stop_before(8192, [], Limits(0, 0), room_gib=0) is None


def test_each_side_stops_by_itself():
    results = climb(InklingStep(), LIMITS, fake)
    assert [run.length for run in results.of(ORIGINAL)] == [2048, 4096, 8192]
    assert [run.length for run in results.of(PATCHED)] == [2048, 4096, 8192, 16384, 32768]
    (stop,) = results.stops
    assert (stop.side, stop.length) == (ORIGINAL, 16384)
    assert list(results.differences.values()) == [0.0, 0.0, 0.0]


def test_the_room_of_a_run_leaves_the_reserve():
    rooms = []

    def measure(workload, length, side, room_gib):
        rooms.append(room_gib)
        return fake(workload, length, side, room_gib)

    climb(InklingStep(lengths=(2048,)), LIMITS, measure)
    assert rooms == [18.0, 18.0]


def test_a_run_beyond_its_limits_is_a_stop_with_the_reason():
    def measure(workload, length, side, room_gib):
        if side == ORIGINAL and length >= failing:
            raise OverLimitError("needed more than 18 GiB")
        return fake(workload, length, side, room_gib)

    failing = 2048
    (stop,) = climb(InklingStep(), LIMITS, measure).stops
    assert (stop.length, stop.seconds, stop.peak_gib) == (2048, None, None)
    shown = program.line(stop, InklingStep())
    assert shown == "2k tokens, Hugging Face, sdpa: needed more than 18 GiB"
    failing = 4096
    (stop,) = climb(InklingStep(), LIMITS, measure).stops
    assert (stop.length, stop.seconds) == (4096, 24.0)


def test_every_run_and_stop_is_reported_with_all_results_until_then():
    reported, numbers = [], []

    def progress(done, results):
        reported.append(done)
        numbers.append(len(results.measurements) + len(results.stops))

    results = climb(InklingStep(), LIMITS, fake, progress)
    assert sorted(reported, key=str) == sorted((*results.measurements, *results.stops), key=str)
    assert numbers == list(range(1, 10))


def test_different_results_are_an_error():
    assert compare([[4.0, 1e-4, 0.0], [4.002, 1e-4, 1e-13]], 2) == pytest.approx(5e-4)
    for wrong in ([4.01, 1e-4, 0.0], [4.0, 1.01e-4, 0.0], [float("nan"), 1e-4, 0.0]):
        with pytest.raises(WrongResultError, match="at 2048 the results"):
            compare([[4.0, 1e-4, 0.0], wrong], 2048)


def test_the_json_has_all_runs_the_machine_and_the_limits(document):
    assert document["machine"] == {**MACHINE, "memory_gib": 24.0}
    assert document["transformers"] == "5.24.0"
    assert document["workload"]["n_layer"] == 6
    assert document["limits"] == {"seconds": 100, "reserve_gib": 2}
    assert len(document["measurements"]) == 8
    assert document["measurements"][0]["peak_gib"] == pytest.approx(0.9)
    assert document["stops"][0]["reason"].startswith("would take 384 s")


def test_a_program_that_ends_while_it_writes_leaves_the_earlier_json(path, monkeypatch):
    def end(path, *_, **__):
        path.write_bytes(b"{")
        raise KeyboardInterrupt

    before = path.read_bytes()
    monkeypatch.setattr(ladder.Path, "write_text", end)
    with pytest.raises(KeyboardInterrupt):
        ladder.write_json(path, MACHINE, InklingStep(), LIMITS, Results())
    assert path.read_bytes() == before


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_the_picture_names_both_sides_the_values_and_the_stop(document, path):
    shown = texts(picture.drawn(document))
    for name in picture.NAMES.values():
        assert shown.count(name) == 2  # in each panel
    assert "36.0× less at 8k tokens" in shown  # 14.4 / 0.4 GiB at 8k
    assert "13.3× as fast at 8k tokens" in shown
    assert "~57.6 GiB" in shown
    assert "14.4 GiB" in shown
    (caption,) = (text for text in shown if "a processor, 2 threads, 24 GiB" in text)
    assert "16k tokens would take 384 s (limit 100 s) and need 58 GiB (18 GiB free)" in caption
    picture.plot(path)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_one_side_and_of_a_stop_without_prediction(document):
    document["measurements"] = [x for x in document["measurements"] if x["side"] == PATCHED]
    document["stops"] = [document["stops"][0] | {"seconds": None, "peak_gib": None}]
    shown = texts(picture.drawn(document))
    assert not any("×" in text for text in shown)
    assert shown.count("patched") == 2


def test_values_have_readable_units():
    assert [picture.gibibytes(x) for x in (0.42, 2.345, 12.0)] == ["430 MiB", "2.35 GiB", "12 GiB"]
    assert [picture.seconds(x) for x in (0.123, 4.56, 1234)] == ["0.12 s", "4.6 s", "1,234 s"]
    assert [picture.length_name(x, "tokens") for x in (64, 32768)] == ["64", "32k"]
    assert picture.length_name(2048, "minutes") == "2048"


@pytest.mark.parametrize("workload", [InklingStep(), ParakeetEncoder()], ids=lambda x: x.name)
def test_the_table_has_rates_and_ratios(workload):
    runs = [
        Measurement(ORIGINAL, workload.lengths[0], 8.0, 1.5, 0.5),
        Measurement(PATCHED, workload.lengths[0], 2.0, 0.25, 0.5),
        Measurement(PATCHED, workload.lengths[1], 5.0, 0.75, 0.5),
    ]
    stop = limits.Stop(ORIGINAL, workload.lengths[1], 130.0, 6.0, "would take 130 s")
    output = io.StringIO()
    results = Results(runs, [stop], {"1": 3e-7})
    Console(file=output, width=120).print(program.table(results, workload))
    lines = [line.split() for line in output.getvalue().splitlines()]
    (first,) = (line for line in lines if line[1:2] == ["8.0"])
    (second,) = (line for line in lines if line[1:4] == ["–"] * 3)
    rates = ("256", "1,024") if workload.unit == "tokens" else ("8.0", "2.0")
    assert first[1:] == ["8.0", rates[0], "1.50", "2.0", rates[1], "0.25", "4.0", "6.0"]
    assert second[4] == "5.0"
    stopped, agreement = program.notes(results, workload)
    assert stopped.endswith(f"{workload.unit}, Hugging Face, sdpa: not run, would take 130 s")
    assert agreement.endswith(": 3e-07")


def test_an_environment_without_transformers_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["long_context", "inkling"])
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make demo-long"):
        program.main()


TINY = {"inkling": ("64", "700"), "parakeet": ("0.02", "0.05")}


@pytest.fixture
def measure():
    pytest.importorskip("transformers", minversion="5.24")
    return functools.partial(worker.in_child, threads=1, seconds=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_both_sides_of_a_tiny_model_agree(name, measure, tmp_path, monkeypatch, capsys):
    """The whole program, on one layer."""
    monkeypatch.setattr(program.machine, "describe", lambda: dict(MACHINE))
    options = ["--layers", "1", "--threads", "1", "--out", str(tmp_path), "--lengths", *TINY[name]]
    monkeypatch.setattr("sys.argv", ["long_context", name, *options])
    program.main()
    written = json.loads((tmp_path / f"long_context_{name}.json").read_text(encoding="utf-8"))
    assert [(run["side"], run["length"]) for run in written["measurements"]] == [
        (side, float(length)) for length in TINY[name] for side in SIDES
    ]
    assert all(run["seconds"] > 0 and run["start_gib"] > 0.05 for run in written["measurements"])
    assert len(written["differences"]) == 2
    assert all(difference < 1e-4 for difference in written["differences"].values())
    assert written["stops"] == []
    assert (tmp_path / f"long_context_{name}.png").exists()
    assert "largest relative difference" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_gets_no_more_memory_than_its_room(measure):
    """The scores of 8 heads and 16,384 tokens need 8 GiB."""
    with pytest.raises(OverLimitError, match="needed more than 3 GiB"):
        measure(InklingStep(n_layer=1), 16384, ORIGINAL, 3.0)


@pytest.mark.slow
def test_a_failing_run_is_an_error_with_its_message(measure):
    with pytest.raises(RuntimeError, match=r"inkling, -1 tokens, patched: (.|\n)*negative"):
        measure(InklingStep(n_layer=1), -1, PATCHED, 8.0)
