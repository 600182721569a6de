"""A run that is interrupted in any phase stops at once and resumes as if it had not been."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.config import RunConfig, override
from transformer_xl.data.vocabularies import ByteVocabulary
from transformer_xl.evaluation import Score
from transformer_xl.model import TransformerXL
from transformer_xl.training import train
from transformer_xl.training.report import read_log
from transformer_xl.training.stopping import SIGNALS, Stopped
from transformer_xl.training.trainer import Trainer

EVERY = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """A run that validates after steps 5 and 10 and whose learning rate follows the validations."""
    return override(
        tiny_config,
        {
            "model.dropout": 0.2,
            "train.max_step": 12,
            "train.eval_interval": 5,
            "train.checkpoint_interval": 4,
            "train.max_eval_steps": 3,
            "train.scheduler": "dev_perf",
            "train.warmup_step": 0,
            "train.log_interval": 2,
        },
    )


def in_validation(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Call `act` once, in the second batch of the validation that belongs to `step`."""
    validate, forward = Trainer.validate, TransformerXL.forward
    scored = []

    def validated(self: Trainer, **options: object) -> Score:
        scored.clear()
        scored.append(self.step)
        return validate(self, **options)

    def forwarded(self: TransformerXL, *args: object, **options: object) -> object:
        if options.get("reduction") == "sum":
            scored.append(0)
            if scored == [step, 0, 0]:
                monkeypatch.undo()
                act()
        return forward(self, *args, **options)

    monkeypatch.setattr(Trainer, "validate", validated)
    monkeypatch.setattr(TransformerXL, "forward", forwarded)


def record(out: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in e.items() if k != "tokens_per_second"} for e in read_log(out)]


def assert_same(out: Path, whole: Path) -> None:
    assert record(out) == record(whole)
    for name in ("last", "best"):
        ours, theirs = open_checkpoint(out / name), open_checkpoint(whole / name)
        assert ours.state == theirs.state
        for file in ("model", "optimizer", "rank-0"):
            path = f"{name}/{file}.safetensors"
            assert (out / path).read_bytes() == (whole / path).read_bytes(), path


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, 5), (signal.SIGHUP, 10), (signal.SIGTERM, 12)]
)
def test_a_signal_during_validation_leaves_the_validation_due(
    tmp_path: Path,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    step: int,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert not train(config, whole).stopped
    in_validation(monkeypatch, step, lambda: signal.raise_signal(number))
    finished = train(config, out)
    assert (finished.step, finished.stopped) == (step, True)
    assert open_checkpoint(out).step == step
    assert open_checkpoint(out).state["validation_due"]
    assert not train(config, out, resume=out).stopped
    assert_same(out, whole)


def test_an_error_during_validation_loses_no_step(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    whole, out = tmp_path / "whole", tmp_path / "out"
    train(config, whole)
    in_validation(monkeypatch, 10, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config, out)
    assert open_checkpoint(out).step == 10
    train(config, out, resume=out)
    assert_same(out, whole)


def test_a_validation_that_is_done_again_is_recorded_once(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the validation of step 10 leaves the checkpoint from before it."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(config, whole)
    advance = Trainer.advance

    def killed(self: Trainer) -> None:
        if self.step == 10:
            raise SystemExit
        advance(self)

    monkeypatch.setattr(Trainer, "advance", killed)
    with pytest.raises(SystemExit):
        train(config, out)
    assert [e["step"] for e in read_log(out) if "valid_loss" in e] == [5, 10]
    monkeypatch.undo()
    train(config, out, resume=out)
    assert_same(out, whole)


def test_a_validation_that_was_due_is_done_in_another_folder(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    in_validation(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    train(config, first)
    in_validation(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    assert train(config, second, resume=first).stopped
    assert open_checkpoint(second).state["validation_due"]
    assert train(config, second, resume=second).step == 12


@EVERY
@pytest.mark.usefixtures("heeded")
def test_a_signal_during_a_step_is_answered_after_it(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    advance = Trainer.advance

    def signalled(self: Trainer) -> None:
        advance(self)
        if self.step == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "advance", signalled)
    finished = train(config, tmp_path)
    assert (finished.step, finished.stopped) == (3, True)
    assert open_checkpoint(tmp_path).step == 3


@EVERY
@pytest.mark.usefixtures("heeded")
def test_a_signal_during_encoding_stops_at_once(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def endless(self: ByteVocabulary, piece: object) -> object:
        yield self.lookup("the first words")
        signal.raise_signal(number)
        pytest.fail("encoding went on")

    monkeypatch.setattr(ByteVocabulary, "lookup_stream", endless)
    cache = tmp_path / "cache"
    with pytest.raises(Stopped, match=number.name):
        train(override(config, {"data.cache_dir": str(cache)}), tmp_path / "out")
    assert list(cache.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_validation_is_done_with_the_weights_of_its_step(tmp_path: Path, config: RunConfig) -> None:
    train(config, tmp_path)
    state = open_checkpoint(tmp_path).state
    assert (state["step"], state["validation_due"]) == (12, False)
    best = open_checkpoint(tmp_path / "best").state
    assert not best["validation_due"]
    assert best["best_loss"] == state["best_loss"] < torch.inf
