"""Paths as users write them: with a tilde, with brackets, with names of emoji."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import txl_kernels
from transformer_xl.cli.app import app
from transformer_xl.data.files import locked
from transformer_xl.training.processes import LOCK
from transformer_xl.training.trainer import Trainer

TINY = (
    *("model.n_layer=1", "model.d_model=16", "model.n_head=2", "model.d_head=8"),
    *("model.d_inner=32", "model.mem_len=8", "train.batch_size=4", "train.tgt_len=8"),
    *("train.eval_batch_size=4", "train.eval_tgt_len=8", "train.max_eval_steps=4"),
    *("train.max_step=2", "train.warmup_step=0", "train.autocast=off", "evaluate.tgt_len=8"),
    *("evaluate.batch_size=2", "evaluate.mem_len=8", "evaluate.max_eval_steps=4"),
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


@pytest.fixture
def home(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home directory that holds a text, and another folder to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "home" / "words.txt").write_bytes(text_file.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert not (tmp_path / "work" / "~").exists()


DATA = ("data.name=text", "data.path=~/words.txt", "data.cache_dir=~/cache")


def test_a_tilde_is_the_home_directory_in_every_path(home: Path) -> None:
    succeed("train", "demo", *TINY, *DATA, "--out=~/runs/first")
    assert {path.name for path in home.iterdir()} == {"words.txt", "cache", "runs"}
    succeed("train", "train.max_step=3", "--resume=~/runs/first")
    succeed("train", "train.max_step=3", "--resume=~/runs/first/best", "--out=~/runs/second")
    begun = ("--init-from=~/runs/first", "--out=~/runs/third")
    shown = succeed("train", "demo", *TINY[6:], *DATA, *begun)
    assert "the preset's model section is ignored" in shown
    assert {path.name for path in (home / "runs").iterdir()} == {"first", "second", "third"}
    assert "bpc" in succeed("evaluate", "~/runs/first", *DATA)
    succeed("generate", "~/runs/first", "--length", "3", "--prompt", "the")
    state = json.loads(
        (home / "runs" / "third" / "last" / "state.json").read_text(), parse_constant=pytest.fail
    )
    assert state["config"]["model"]["n_layer"] == 1


def test_a_field_of_the_checkpoints_model_may_be_repeated_but_not_changed(home: Path) -> None:
    succeed("train", "demo", *TINY, *DATA, "--out=first")
    begun = ("--init-from=first", "--out=second")
    for field, message in (
        ("n_layer=2", "n_layer 1 there, 2 here"),
        ("vocab_size=9", "vocab_size"),
    ):
        result = run("train", "demo", *TINY[6:], *DATA, *begun, f"model.{field}")
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    succeed("train", "demo", *TINY, *DATA, *begun, "model.init_std=3")


@pytest.mark.parametrize("name", ["exp[lr]", "[/lr]", "a:b:c", "a long name " * 8 + "."])
def test_a_path_is_printed_as_it_is(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def interrupted(trainer: Trainer) -> None:
        advance(trainer)
        if trainer.step == 1:
            signal.raise_signal(signal.SIGTERM)

    out = tmp_path / "work" / name
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "advance", interrupted)
        shown = succeed("train", "demo", *TINY, *DATA, "--out", out)
    assert f"--resume {out} goes on" in shown
    succeed("train", "--resume", out)
    with locked(out / LOCK):
        assert f"another process trains in {out};" in _refused(out)


def _refused(out: Path) -> str:
    """The error of a run in another thread, where a lock of this one counts."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(run("train", "--resume", out)))
    thread.start()
    thread.join()
    assert results[0].exit_code == 2
    return results[0].stderr


def test_doctor_prints_brackets_of_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(txl_kernels, "__file__", "/opt/[dev]/[/x]/__init__.py")
    assert "/opt/[dev]/[/x]" in succeed("doctor")


def test_the_state_before_the_first_validation_is_json(home: Path) -> None:
    changes = ("train.eval_interval=99", "train.checkpoint_interval=1", "train.scheduler=dev_perf")
    seen, rename = [], Path.rename

    def read_first(path: Path, target: Path) -> Path:
        if path.name == "last.new":
            text = (path / "state.json").read_text()
            seen.append(json.loads(text, parse_constant=pytest.fail))
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "rename", read_first)
        succeed("train", "demo", *TINY, *changes, *DATA, "--out=run")
    assert seen[0]["best_loss"] is None
    assert seen[0]["schedule"]["best"] is None
    assert seen[-1]["best_loss"] > 0
