"""Checkpoints from strangers: their sizes and types are checked before anything is allocated."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from transformer_xl.checkpoint import CheckpointError, open_checkpoint
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.config import RunConfig
from transformer_xl.data import open_corpus
from transformer_xl.training.processes import join_processes
from transformer_xl.training.report import LOG, _cut_log, read_log
from transformer_xl.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def trainer(tiny_config: RunConfig, tmp_path: Path) -> Trainer:
    """A trainer after one step, which is saved in `last`."""
    trainer = Trainer(tiny_config, open_corpus(tiny_config.data), join_processes())
    trainer.advance()
    trainer.save(tmp_path / "last")
    return trainer


def change_state(folder: Path, **changes: object) -> None:
    path = folder / "last" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


def test_states_of_another_size_never_reach_the_optimizer(trainer: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "last" / "optimizer.safetensors"
    change_tensors(path, lambda name, t: t[:1].clone() if name.endswith("exp_avg") else t)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors does not fit the model: .*"):
        trainer.restore(open_checkpoint(tmp_path))
    change_tensors(path, lambda name, t: t.long())
    with pytest.raises(CheckpointError, match=r"does not fit .* is torch.int64 .*expected float"):
        trainer.restore(open_checkpoint(tmp_path))
    save_file({name: t for name, t in load_file(path).items() if "exp_avg_sq" not in name}, path)
    with pytest.raises(CheckpointError, match="expected exp_avg, exp_avg_sq, step"):
        trainer.restore(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("loss_sum", torch.zeros(2), r"loss_sum: expected torch.float64 \[\], found torch.float32"),
        ("rng.cpu", torch.zeros(9, dtype=torch.uint8), "rng.cpu: "),
        ("rng.cpu", torch.zeros(5056), "rng.cpu: expected torch.uint8"),
        ("memory.0.hidden", torch.zeros(1, 4, 3, 16), "memory.0.hidden: expected floating point"),
        ("memory.0.start", torch.full((4,), 99), r"memory.0.start: expected positions in \[0, 8\]"),
    ],
)
def test_tensors_of_a_process_fit_it(
    name: str, tensor: Tensor, message: str, trainer: Trainer, tmp_path: Path
) -> None:
    path = tmp_path / "last" / "rank-0.safetensors"
    save_file(load_file(path) | {name: tensor}, path)
    with pytest.raises(CheckpointError, match=rf"rank-0\.safetensors is damaged: {message}"):
        trainer.restore(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "7"}, "step: expected 0 or more steps, found '7'"),
        ({"step": 1e400}, "is not JSON|step: expected"),
        ({"aliases": {"a": ["b"]}}, "aliases: expected names by name"),
        ({"config": 3}, "config: expected a configuration, found 3"),
        ({"config": {"model": None}}, "its configuration: "),
        ({"loss_steps": -1}, "loss_steps: expected an integer in"),
        ({"best_loss": "low"}, "best_loss: expected a loss or null, found 'low'"),
        ({"schedule": {}}, "it has no 'best'"),
        ({"data": []}, "data: expected a data position"),
        ({"data": {"position": 0}}, "data position: saved with batch_size None"),
    ],
)
def test_states_that_no_training_wrote(
    changes: dict[str, object], message: str, trainer: Trainer, tmp_path: Path
) -> None:
    change_state(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"state\.json.*({message})"):
        trainer.restore(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"), [("n_layer", 10**9), ("d_model", 10**6), ("d_inner", 2**62)]
)
def test_a_configuration_cannot_allocate_more_than_its_weights_have(
    field: str, value: int, trainer: Trainer, tmp_path: Path
) -> None:
    config = json.loads((tmp_path / "last" / "state.json").read_text())["config"]
    config["model"][field] = value
    change_state(tmp_path, config=config)
    with pytest.raises(CheckpointError, match=r"last is damaged: .*(n_layer|weights|sizes)"):
        LoadedModel.open(tmp_path, CPU)


def test_a_vocabulary_has_the_size_of_its_model(trainer: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "last" / "vocab.json"
    path.write_text('{"kind": "byte", "values": [65, 66], "dropped": []}')
    with pytest.raises(CheckpointError, match=r"vocab\.json is damaged: expected 256 bytes .* 2$"):
        LoadedModel.open(tmp_path, CPU)


def test_weights_of_other_types_are_refused(trainer: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "last" / "model.safetensors"
    change_tensors(path, lambda name, tensor: tensor.to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: .* found F8_E4M3"):
        LoadedModel.open(tmp_path, CPU)


@pytest.mark.parametrize("name", ["state.json", "vocab.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "FIFO"])
def test_files_of_a_checkpoint_are_regular(
    kind: str, name: str, trainer: Trainer, tmp_path: Path
) -> None:
    path = tmp_path / "last" / name
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(CheckpointError, match=rf"{name}.*expected a file, found a {kind}"):
        LoadedModel.open(tmp_path, CPU)


def test_lines_of_a_log_that_are_no_entries_are_left_out(tmp_path: Path) -> None:
    lines = [b'{"step": 1}', b"[1]", b"{}", b'{"step": "x"}', b"\xff\xfe", b"[" * 100_000, b"NaN"]
    (tmp_path / LOG).write_bytes(b"\n".join([*lines, b'{"step": 9}', b'{"st']))
    assert read_log(tmp_path) == [{"step": 1}, {"step": 9}]
    _cut_log(tmp_path / LOG, 3, validation_due=False)
    assert (tmp_path / LOG).read_text() == '{"step": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == [LOG]
