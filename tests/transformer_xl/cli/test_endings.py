"""How commands end that diverge or are stopped: exit status, one sentence, nothing lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.cli.app import app
from transformer_xl.data.vocabularies import ByteVocabulary
from transformer_xl.training import curve
from transformer_xl.training.trainer import Trainer

SMALL = (
    *("model.n_layer=1", "model.d_model=16", "model.n_head=2", "model.d_head=8"),
    *("model.d_inner=32", "train.batch_size=4", "train.max_step=4", "train.warmup_step=0"),
    *("train.eval_interval=4", "train.log_interval=2", "train.max_eval_steps=2"),
    *("evaluate.max_eval_steps=2", "data.tokenizer=byte"),
)


@pytest.fixture
def data(text_file: Path, tmp_path: Path) -> list[str]:
    return ["data.name=text", f"data.path={text_file}", f"data.cache_dir={tmp_path}/cache"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_diverged_run_ends_with_status_1_and_names_the_step(
    tmp_path: Path, data: list[str]
) -> None:
    fast = ("train.lr=1e30", "train.clip=0", "train.checkpoint_interval=1")
    done = run("train", "demo", *SMALL, *data, *fast, "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert "error" in done.stderr
    assert "at step 1: the run diverged" in " ".join(done.stderr.split())
    assert not (tmp_path / "run" / "last").exists()


def test_weights_that_are_not_finite_are_neither_scored_nor_sampled(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(self: Trainer) -> None:
        with torch.no_grad():
            next(self.model.parameters()).fill_(torch.nan)

    monkeypatch.setattr(Trainer, "_check_finite", spoiled)
    out = tmp_path / "run"
    assert run("train", "demo", *SMALL, *data, "train.max_eval_steps=1", "--out", out).exit_code
    assert open_checkpoint(out).step == 4
    for command in (("evaluate",), ("generate", "--prompt", "the ")):
        done = run(command[0], out, *command[1:])
        assert done.exit_code == 2
        assert "holds a diverged model" in " ".join(done.stderr.split())
        assert done.stdout.strip() in ("", "the")


def stop_encoding(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    def endless(self: ByteVocabulary, piece: object) -> object:
        yield self.lookup("the first words")
        signal.raise_signal(number)
        pytest.fail("encoding went on")

    monkeypatch.setattr(ByteVocabulary, "lookup_stream", endless)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("command", ["train", "demo"])
def test_a_signal_during_encoding_ends_a_command_at_once(
    tmp_path: Path,
    data: list[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    number: signal.Signals,
    status: int,
) -> None:
    stop_encoding(monkeypatch, number)
    preset = ["demo"] if command == "train" else []
    done = run(command, *preset, *SMALL, *data, "--out", tmp_path / "run")
    assert (done.exit_code, done.stderr.strip()) == (status, f"stopped by {number.name}")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_stopped_training_ends_the_demo(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def signalled(self: Trainer) -> None:
        advance(self)
        if self.step == 2 and (tmp_path / "run" / "memory").exists():
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "advance", signalled)
    done = run("demo", *SMALL, *data, "--out", tmp_path / "run")
    assert done.exit_code == 130, done.output
    assert done.stderr.strip() == "stopped"
    assert not (tmp_path / "run" / "no_memory").exists()


def test_a_demo_removes_no_runs_but_its_own(tmp_path: Path, data: list[str]) -> None:
    mine = tmp_path / "run" / "memory" / "last" / "state.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    done = run("demo", *SMALL, *data, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert "is not the result of a demo" in " ".join(done.stderr.split())
    assert mine.exists()


def test_a_picture_that_fails_does_not_end_the_demo(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(curve, "_draw", fail)
    done = run("demo", *SMALL, *data, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert shown.count("was not drawn: no fonts") == 3  # one for each training, one for both
    assert (tmp_path / "run" / "results.json").exists()
