"""A run that diverges stops with one sentence and leaves its checkpoints as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from transformer_xl.checkpoint import CheckpointError, open_checkpoint
from transformer_xl.config import RunConfig, override
from transformer_xl.data import open_corpus
from transformer_xl.model import TransformerXL
from transformer_xl.training import train
from transformer_xl.training.processes import join_processes
from transformer_xl.training.report import CURVE, read_log
from transformer_xl.training.trainer import Trainer

QUIET = {"train.log_interval": 1000, "train.checkpoint_interval": 1, "train.eval_interval": 1000}


def trainer(config: RunConfig, **changes: object) -> Trainer:
    changed = override(config, {k.replace("__", "."): v for k, v in changes.items()})
    made = Trainer(changed, open_corpus(changed.data), join_processes())
    made.advance()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable], None]:
    """Call a function with the trainer right after a step of any run."""

    def install(step: int, function: Callable[[Trainer], object]) -> None:
        advance = Trainer.advance

        def advanced(self: Trainer) -> None:
            advance(self)
            if self.step == step:
                function(self)

        monkeypatch.setattr(Trainer, "advance", advanced)

    return install


def spoil_weight(of: Trainer, value: float = math.nan) -> None:
    with torch.no_grad():
        next(of.model.parameters()).flatten()[-1] = value


def enlarge_weights(of: Trainer) -> None:
    with torch.no_grad():
        for parameter in of.model.parameters():
            parameter.fill_(1e30)


def spoil_optimizer(of: Trainer) -> None:
    of.optimizer.state[next(of.model.parameters())]["exp_avg_sq"].flatten()[0] = math.inf


def spoil_unlogged_loss(of: Trainer) -> None:
    of._loss_sum += math.inf


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_weight, "the weight .* is not finite"),
        (lambda of: spoil_weight(of, -math.inf), "the weight .* is not finite"),
        (spoil_optimizer, "the optimizer state .*exp_avg_sq is not finite"),
        (spoil_unlogged_loss, "the training loss .* is not finite"),
        (enlarge_weights, "the loss of the last batch with the new weights is (nan|inf)"),
    ],
    ids=["nan-weight", "infinite-weight", "optimizer", "unlogged-loss", "huge-weights"],
)
def test_a_state_that_cannot_be_trained_further_replaces_no_checkpoint(
    tmp_path: Path,
    tiny_config: RunConfig,
    at_step: Callable[..., None],
    spoil: Callable[[Trainer], object],
    reason: str,
) -> None:
    at_step(3, spoil)
    with pytest.raises(FloatingPointError, match=f"{reason} at step 3: the run diverged"):
        train(override(tiny_config, QUIET), tmp_path)
    assert open_checkpoint(tmp_path).step == 2
    assert not (tmp_path / "best").exists()
    assert (tmp_path / CURVE).exists()


def test_a_learning_rate_far_too_high_leaves_the_last_checkpoint(
    tmp_path: Path, tiny_config: RunConfig
) -> None:
    config = override(tiny_config, QUIET | {"train.max_step": 2, "train.lr": 0})
    train(config, tmp_path)
    before = contents(tmp_path / "last"), contents(tmp_path / "best")
    fast = {"train.lr": 1e30, "train.clip": 0, "train.warmup_step": 0, "train.max_step": 9}
    with pytest.raises(FloatingPointError, match="at step 3"):
        train(override(config, fast), tmp_path, resume=tmp_path)
    assert (contents(tmp_path / "last"), contents(tmp_path / "best")) == before


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    config = override(tiny_config, {"train.eval_interval": 2, "train.max_step": 2})
    train(config, tmp_path)
    before = contents(tmp_path / "best")
    forward = TransformerXL.forward

    def spoiled(self: TransformerXL, *args: object, **options: object) -> object:
        output = forward(self, *args, **options)
        scoring = options.get("reduction") == "sum"
        return output._replace(loss=output.loss * loss) if scoring else output

    monkeypatch.setattr(TransformerXL, "forward", spoiled)
    with pytest.raises(FloatingPointError, match=f"the validation loss is {loss} at step 4"):
        train(override(config, {"train.max_step": 9}), tmp_path, resume=tmp_path)
    assert contents(tmp_path / "best") == before
    assert all(math.isfinite(e.get("valid_loss", 0)) for e in read_log(tmp_path))
    last = open_checkpoint(tmp_path)
    assert (last.step, last.state["validation_due"]) == (4, True)


@pytest.mark.parametrize("batch_chunk", [1, 2])
def test_the_check_before_saving_changes_nothing(
    tmp_path: Path, tiny_config: RunConfig, batch_chunk: int
) -> None:
    changes = {"model__dropout": 0.2, "train__batch_chunk": batch_chunk}
    checked, unchecked = (trainer(tiny_config, **changes) for _ in range(2))
    flags = [module.training for module in checked.model.modules()]
    torch.manual_seed(1)
    checked.save(tmp_path / "last")
    assert [module.training for module in checked.model.modules()] == flags
    checked.advance()
    torch.manual_seed(1)
    unchecked.advance()
    assert checked.mean_loss() == unchecked.mean_loss()
    for ours, theirs in zip(checked._memories, unchecked._memories, strict=True):
        assert torch.equal(ours.hidden, theirs.hidden)


def test_every_process_stops_where_one_diverges(
    tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = trainer(tiny_config)
    monkeypatch.setattr(healthy.accelerator, "reduce", lambda found, reduction: found + 1)
    with pytest.raises(FloatingPointError, match="another process cannot go on at step 1"):
        healthy.save(tmp_path / "last")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_loaded(
    tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverged = trainer(tiny_config)
    spoil_weight(diverged)
    monkeypatch.setattr(Trainer, "_check_finite", lambda self: None)
    diverged.save(tmp_path / "last")
    saved = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="holds a diverged model: its weight"):
        saved.load_model(TransformerXL(saved.config.model))
    with pytest.raises(CheckpointError, match="diverged"):
        train(tiny_config, tmp_path, resume=tmp_path)
    with pytest.raises(CheckpointError, match="diverged"):
        train(tiny_config, tmp_path / "tuned", init_from=tmp_path)
