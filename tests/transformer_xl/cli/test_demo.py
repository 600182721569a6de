"""The demo, small: what it compares and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformer_xl.cli.app import app
from transformer_xl.config import load_preset
from transformer_xl.data import datasets

SMALL = (
    *("model.n_layer=1", "model.d_model=16", "model.n_head=2", "model.d_head=8"),
    *("model.d_inner=32", "train.batch_size=4", "train.max_step=8", "train.warmup_step=2"),
    *("train.eval_interval=4", "train.log_interval=2", "train.max_eval_steps=4"),
    *("evaluate.max_eval_steps=4",),
)


def test_demo_compares_memory_with_none(tmp_path: Path, text_file: Path) -> None:
    data = ("data.name=text", f"data.path={text_file}", f"data.cache_dir={tmp_path}/cache")
    fields, out = (*SMALL, *data, "train.autocast=off"), tmp_path / "demo"
    for _ in range(2):  # a second one replaces the first
        done = CliRunner().invoke(app, ["demo", *fields, "--out", str(out)])
        assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    results = json.loads((out / "results.json").read_text())
    as_trained = load_preset("demo").model.mem_len
    mem_lens = {name: score["protocol"] for name, score in results["evaluations"].items()}
    assert f"mem_len {as_trained}," in mem_lens["memory as trained"]
    for name in ("trained without memory", "without its memory"):
        assert "mem_len 0," in mem_lens[name]
    scores = results["evaluations"].values()
    assert all(score["bpc"] > 0 and score["tokens_per_second"] > 0 for score in scores)
    assert len({score["n_tokens"] for score in scores}) == 1
    projected = results["evaluations_hidden_states"]
    assert projected.keys() == results["evaluations"].keys()
    for name, score in results["evaluations"].items():
        assert projected[name]["bpc"] == pytest.approx(score["bpc"], abs=5e-5)
        shown = [f"{path['bpc']:.4f}" for path in (score, projected[name])]
        assert all(done.stdout.count(number) >= shown.count(number) for number in shown)
        assert projected[name]["tokens_per_second"] > 0
        assert "hidden states projected again" in projected[name]["protocol"]
        assert "hidden states" not in score["protocol"]
    assert set(results["generation_tokens_per_second"]) == {"cached", "hidden_states"}
    assert all(speed > 0 for speed in results["generation_tokens_per_second"].values())
    assert {run["step"] for run in results["training"].values()} == {8}
    assert len((out / "sample.txt").read_text().rstrip("\n")) <= 500
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    for run in ("memory", "no_memory"):
        assert (out / run / "best" / "state.json").exists()
        assert (out / run / "last" / "state.json").exists()
    for part in (
        "Memory is worth",
        "Written at",
        "memory longer than trained",
        "valid bpc",
    ):
        assert part in done.stdout


def test_demo_takes_fewer_steps_on_a_slow_machine(tmp_path: Path, text_file: Path) -> None:
    data = ("data.name=text", f"data.path={text_file}", f"data.cache_dir={tmp_path}/cache")
    out = tmp_path / "demo"
    done = CliRunner().invoke(app, ["demo", *SMALL, *data, "--out", str(out), "--seconds", "0"])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    results = json.loads((out / "results.json").read_text())
    assert {run["step"] for run in results["training"].values()} == {1}


@pytest.mark.slow
def test_demo_reads_a_vocabulary_without_a_newline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "WIKI8_BYTES", (48_000, 8_000, 8_000))
    (tmp_path / "text8").write_text("a memory of the segment " * 2_666 + "a memory of the s"[:16])
    data = ("data.name=text8", f"data.path={tmp_path}", f"data.cache_dir={tmp_path}/cache")
    out = tmp_path / "demo"
    done = CliRunner().invoke(app, ["demo", *SMALL, *data, "--out", str(out), "--seconds", "0"])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    sample = (out / "sample.txt").read_text().removesuffix("\n")
    assert len(sample) == 500
    assert set(sample) <= set(" abcdefghijklmnopqrstuvwxyz")
