"""Table 9: costs per token from measured layers, a whole run at tiny sizes, its documents."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import registry, tables
from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError
from benchmarks.cases.layer import HF, HIDDEN_STATES
from benchmarks.measure import Round, Rounds
from benchmarks.peers import hf, vanilla
from benchmarks.table9 import command, contenders, costs, document
from benchmarks.table9.contenders import CACHED, WHOLE
from benchmarks.table9.costs import VANILLA_CACHED, VANILLA_EAGER, VANILLA_SDPA

MACHINE = {"processor": "a processor", "threads": 1, "torch": "2.13.0"}
LARGE = registry.evaluated_layer("enwik8_large", mem_len=800, clamp_len=1000)


def test_costs_of_a_token():
    seconds = {OURS: 0.64, HIDDEN_STATES: 1.28, "inner-sdpa": 3.0, "last-sdpa": 0.5, WHOLE: 12.8}
    seconds[CACHED] = 0.01 * contenders.cached_steps()
    found = costs.per_token(seconds, n_layer=12, tgt_len=128)
    assert found == pytest.approx(
        {
            OURS: 12 * 0.005,
            HIDDEN_STATES: 12 * 0.01,
            VANILLA_SDPA: 11 * 3.0 + 0.5,
            VANILLA_CACHED: 12 * 0.01,
            WHOLE: 0.1,
        }
    )


@pytest.mark.parametrize(
    ("length", "ratio"), [(800, 675), (1800, 1338), (2800, 1890), (3800, 2378)]
)
def test_the_operations_allow_more_than_the_paper(length, ratio):
    shape = registry.evaluated_layer("enwik8_large", mem_len=length, clamp_len=1000)
    flop = costs.flop_per_token(shape, 24)
    assert flop[VANILLA_SDPA] / flop[OURS] == pytest.approx(ratio, abs=1)
    assert ratio > costs.PAPER[length]
    assert flop[VANILLA_EAGER] == flop[VANILLA_SDPA]
    assert flop[VANILLA_CACHED] < flop[OURS] < flop[HIDDEN_STATES] < flop[HF]


def test_ratios_are_formed_within_rounds():
    names = [OURS, "inner-sdpa", "last-sdpa", WHOLE]
    kept = [Round(1.0, (0.128, 1.0, 0.5, 6.4)), Round(1.0, (0.256, 2.0, 1.0, 12.8))]
    rounds = Rounds(kept, dropped=3, quiet=False)
    found = costs.row("enwik8_large", LARGE, 24, names, rounds, whole=24)
    assert found.ratio[VANILLA_SDPA].q1 == found.ratio[VANILLA_SDPA].q3
    assert found.ratio[VANILLA_SDPA].median == pytest.approx(23.5 / (24 * 0.001))
    assert found.seconds[OURS].median == pytest.approx(24 * 0.0015)
    assert (found.length, found.rounds, found.dropped, found.quiet) == (800, 2, 3, False)
    assert WHOLE in found.seconds
    assert WHOLE not in costs.row("enwik8_large", LARGE, 12, names, rounds, whole=24).seconds


@pytest.fixture
def tiny(monkeypatch):
    """Layers of tiny width, without Hugging Face's environment; restores the threads."""

    def without_environment():
        raise PeerUnavailableError("no environment")

    def tiny_layer(preset, **lengths):
        return layer(preset, **lengths).tiny()

    layer, threads = registry.evaluated_layer, torch.get_num_threads()
    monkeypatch.setattr(registry, "evaluated_layer", tiny_layer)
    monkeypatch.setattr(hf, "interpreter", without_environment)
    monkeypatch.setattr(contenders, "CACHED_LAYERS", 2)
    monkeypatch.setattr(command.machine, "describe", lambda: MACHINE)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("tiny")
def test_a_run_is_measured_written_and_drawn(monkeypatch, tmp_path, capsys):
    arguments = ["table9", "--quick", "--lengths", "24", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--presets", "enwik8_base"])
    benchmarks.main()
    assert "| `enwik8_base` | 12 | 24 |" in capsys.readouterr().out
    (path,) = tmp_path.glob("table9-a-processor-*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["notes"] == {HF: "no environment"}
    assert [row["n_layer"] for row in record["rows"]] == [12, 24]
    measured = {VANILLA_SDPA, VANILLA_EAGER, VANILLA_CACHED, HIDDEN_STATES, OURS}
    for row, whole in zip(record["rows"], ({WHOLE}, set()), strict=True):
        assert set(row["seconds"]) == measured | whole
        assert all(spread["median"] > 0 for spread in row["seconds"].values())
        assert row["ratio"][OURS]["median"] == 1
    assert path.with_suffix(".png").stat().st_size > 10_000

    places = {"README.md": tmp_path / "README.md", "docs": tmp_path / "docs" / "benchmarks.md"}
    places["docs"].parent.mkdir()
    for place in places.values():
        place.write_text("<!-- table9 -->\n<!-- /table9 -->\n", encoding="utf-8")
    monkeypatch.setattr(document, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["document", str(path)])
    document.main()
    shown = {name: place.read_text(encoding="utf-8") for name, place in places.items()}
    assert shown["README.md"].count("| `enwik8_base` |") == 1, "its own number of layers only"
    assert shown["docs"].count("| `enwik8_base` |") == 2
    assert "Not measured: hf: no environment." in shown["docs"]
    assert path.name in shown["README.md"]
    assert f"](benchmarks/results/{path.stem}.png)" in shown["README.md"]


@pytest.mark.usefixtures("tiny")
def test_nothing_is_timed_after_a_wrong_result(monkeypatch):
    monkeypatch.setattr(vanilla, "sdpa", lambda q, k, v: v[:, :, : q.shape[2]])
    monkeypatch.setattr(command, "take_rounds", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(WrongResultError, match=r"vanilla .* is off by"):
        command.main(["--lengths", "24", "--threads", "1"])


def test_scores_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(contenders.room, "free", lambda: 2**31)
    long = registry.evaluated_layer("enwik8_base", mem_len=20_000, clamp_len=1000)
    with pytest.raises(PeerUnavailableError, match="needs 51,200,000,000 bytes"):
        contenders._recomputed(long, "eager", vanilla.eager)


def test_lengths_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--lengths", "0"])
    assert "--lengths: expected 1 or more tokens, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["README.md", "docs/benchmarks.md"])
def test_the_table_has_a_place(place):
    text = (tables.ROOT / place).read_text(encoding="utf-8")
    assert "<!-- table9 -->" in text
