"""The step: accumulation, validation, and going on from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from transformer_xl.checkpoint import CheckpointError, open_checkpoint
from transformer_xl.config import RunConfig, override
from transformer_xl.data import open_corpus
from transformer_xl.evaluation import Lengths
from transformer_xl.training.processes import join_processes, share
from transformer_xl.training.trainer import Trainer, validation_lengths
from txl_kernels import BackendUnavailableError


def trainer(config: RunConfig, **changes: object) -> Trainer:
    changed = override(config, {k.replace("__", "."): v for k, v in changes.items()})
    return Trainer(changed, open_corpus(changed.data), join_processes())


def losses(running: Trainer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        running.advance()
        found.append(running.mean_loss())
    return found


def test_training_lowers_the_loss(tiny_config: RunConfig) -> None:
    found = losses(trainer(tiny_config), 24)
    assert found[0] == pytest.approx(math.log(256), abs=0.2)
    assert found[-1] < 0.75 * found[0]


def test_the_backend_is_the_one_asked_for(tiny_config: RunConfig) -> None:
    """Triton runs on a CPU in its interpreter alone, as the first step says; the reference trains
    as "auto" does."""
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET"):
        trainer(tiny_config, train__backend="triton").advance()
    reference = trainer(tiny_config, train__backend="reference")
    assert {m.backend for m in reference.model.modules() if hasattr(m, "backend")} == {"reference"}
    assert losses(reference, 4) == pytest.approx(losses(trainer(tiny_config), 4), rel=1e-4)


@pytest.mark.parametrize("batch_chunk", [2, 3, 4])
def test_accumulated_gradients_are_the_whole_batchs(
    tiny_config: RunConfig, batch_chunk: int
) -> None:
    whole, parts = trainer(tiny_config), trainer(tiny_config, train__batch_chunk=batch_chunk)
    assert losses(parts, 6) == pytest.approx(losses(whole, 6), rel=1e-5)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []

    def measured(self: Trainer, *_: object) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    for clip, expected in ((0.01, 0.01), (0.0, None)):
        running = trainer(tiny_config, train__clip=clip)
        running.optimizer.step = lambda running=running: measured(running)
        running.advance()
        if expected is not None:
            assert norms[-1] == pytest.approx(expected, rel=1e-3)
        else:
            assert norms[-1] > 0.1


@pytest.mark.parametrize("autocast", ["off", "bf16"])
@pytest.mark.parametrize("batch_chunk", [1, 2])
def test_going_on_is_bit_identical(
    tmp_path: Path, tiny_config: RunConfig, autocast: str, batch_chunk: int
) -> None:
    """Step, schedule, data position, memory, random numbers (dropout) and optimizer."""
    changes = {
        "model__dropout": 0.2,
        "model__dropatt": 0.1,
        "train__autocast": autocast,
        "train__batch_chunk": batch_chunk,
    }
    first = trainer(tiny_config, **changes)
    losses(first, 5)
    first.advance()  # a loss that is not read yet is kept too
    first.save(tmp_path / "last")
    expected = losses(first, 6)
    second = trainer(tiny_config, **changes, train__seed=5)
    second.restore(open_checkpoint(tmp_path / "last"))
    assert second.step == 6
    assert losses(second, 6) == expected
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resuming_something_else_is_refused(tmp_path: Path, tiny_config: RunConfig) -> None:
    first = trainer(tiny_config)
    first.advance()
    first.save(tmp_path / "last")
    saved = open_checkpoint(tmp_path / "last")
    with pytest.raises(CheckpointError, match="of another model: n_layer 2 there, 3 here"):
        trainer(tiny_config, model__n_layer=3).restore(saved)
    with pytest.raises(CheckpointError, match="batch_chunk 1"):
        trainer(tiny_config, train__batch_chunk=2).restore(saved)
    with pytest.raises(ValueError, match="batch_size"):
        trainer(tiny_config, train__batch_size=8).restore(saved)
    text = tmp_path / "other.txt"
    text.write_text("something else " * 4000)
    with pytest.raises(CheckpointError, match="another corpus"):
        trainer(tiny_config, data__path=str(text)).restore(saved)


def test_validation_reaches_as_far_as_training(tiny_config: RunConfig) -> None:
    longer = override(tiny_config, {"train.tgt_len": 20, "model.clamp_len": 9})
    assert validation_lengths(longer) == (8, Lengths(24, 9, False))
    without = override(longer, {"model.mem_len": 0})
    assert validation_lengths(without) == (20, Lengths(0, 9, False))
    short = override(tiny_config, {"train.eval_tgt_len": 64})
    assert validation_lengths(short) == (64, Lengths(0, -1, False))


def test_validation_leaves_training_as_it_was(tiny_config: RunConfig) -> None:
    first, second = trainer(tiny_config), trainer(tiny_config)
    losses(first, 3)
    losses(second, 3)
    score = first.validate()
    assert "valid split of text" in score.protocol
    assert losses(first, 3) == losses(second, 3)


def test_rows_are_shared_without_gaps() -> None:
    assert [share("batch_size", 10, i, 3) for i in range(3)] == [(0, 3), (3, 6), (6, 10)]
    with pytest.raises(ValueError, match="batch_size: expected at least 4 rows"):
        share("batch_size", 3, 0, 4)


def test_a_corpus_too_short_to_validate_is_noticed_at_once(tiny_config: RunConfig) -> None:
    with pytest.raises(ValueError, match="shorter than one segment"):
        trainer(tiny_config, train__eval_tgt_len=10_000, model__mem_len=1)


def test_compiled_training_gives_the_same_losses(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = torch.nn.Module.compile  # without its code generator, which takes minutes
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiling(model, backend="eager"))
    plain = losses(trainer(tiny_config), 3)
    compiled = losses(trainer(tiny_config, train__compile=True), 3)
    assert compiled == pytest.approx(plain, rel=1e-4)
