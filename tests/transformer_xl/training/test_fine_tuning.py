"""`--init-from` begins with a checkpoint's model: its weights and its model section."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from transformer_xl.checkpoint import CheckpointError, open_checkpoint
from transformer_xl.cli.settings import from_preset
from transformer_xl.config import ModelConfig, RunConfig, override
from transformer_xl.model import TransformerXL
from transformer_xl.training import train
from transformer_xl.training.report import read_log


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first run is; the tests share it."""
    return tmp_path_factory.mktemp("first") / "run"


@pytest.fixture
def begun(first: Path, tiny_config: RunConfig) -> RunConfig:
    """The first run's configuration; in its model LayerNorm comes before each sublayer."""
    config = override(tiny_config, {"model.pre_lnorm": True, "train.max_step": 12})
    if not first.exists():
        train(config, first, console=Console(file=io.StringIO()))
    return config


def fine_tuned(config: RunConfig, out: Path, first: Path) -> tuple[str, float]:
    """What a run of one step prints, and its loss."""
    console = Console(file=io.StringIO(), width=200)
    config = override(config, {"train.max_step": 1})
    train(config, out, init_from=first, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), read_log(out)[0]["train_loss"]


def test_the_loss_goes_on_where_the_first_run_ended(
    begun: RunConfig, first: Path, tmp_path: Path
) -> None:
    shown, loss = fine_tuned(begun, tmp_path / "second", first)
    last = [e["train_loss"] for e in read_log(first) if "train_loss" in e][-1]
    assert abs(loss - last) < 0.3
    assert shown.count("the preset's model section is ignored") == 1
    assert "model." not in shown


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("mem_len", 4, "model.mem_len: 12 -> 4"),
        ("clamp_len", 6, "model.clamp_len: -1 -> 6"),
        ("same_length", True, "model.same_length: False -> True"),
        ("dropout", 0.1, "model.dropout: 0.0 -> 0.1"),
        ("dropatt", 0.1, "model.dropatt: 0.0 -> 0.1"),
        ("sample_softmax", 16, "model.sample_softmax: -1 -> 16"),
        ("gradient_checkpointing", True, "model.gradient_checkpointing: False -> True"),
    ],
)
def test_fields_that_keep_the_meaning_of_the_weights_may_differ_and_are_reported(
    field: str, value: object, line: str, begun: RunConfig, first: Path, tmp_path: Path
) -> None:
    config = override(begun, {f"model.{field}": value})
    shown, _ = fine_tuned(config, tmp_path / "second", first)
    assert line in shown
    assert getattr(open_checkpoint(tmp_path / "second").config.model, field) == value


def test_fields_of_first_weights_are_ignored(begun: RunConfig, first: Path, tmp_path: Path) -> None:
    changes = {"init": "uniform", "init_range": 9.0, "init_std": 9.0, "proj_init_std": 9.0}
    config = override(begun, {f"model.{name}": value for name, value in changes.items()})
    plain = fine_tuned(begun, tmp_path / "plain", first)[1]
    assert fine_tuned(config, tmp_path / "second", first)[1] == plain


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pre_lnorm", False, "pre_lnorm True there, False here"),
        ("final_lnorm", True, "final_lnorm False there, True here"),
        ("layer_norm_epsilon", 1e-12, "layer_norm_epsilon 1e-05 there, 1e-12 here"),
        ("first_memory", "zeros", "first_memory empty there, zeros here"),
        ("same_length_keys", "mem_len+1", "same_length_keys mem_len there"),
        ("n_head", 4, "n_head 2 there, 4 here"),
        ("tie_weight", False, "tie_weight True there, False here"),
    ],
)
def test_every_other_difference_is_an_error(
    field: str, value: object, message: str, begun: RunConfig, first: Path, tmp_path: Path
) -> None:
    config = override(begun, {f"model.{field}": value})
    with pytest.raises(CheckpointError, match=f"is of another model: .*{message}"):
        fine_tuned(config, tmp_path / "second", first)


def test_weights_are_not_loaded_into_a_model_that_computes_otherwise(
    begun: RunConfig, first: Path
) -> None:
    saved = open_checkpoint(first)
    other = dataclasses.replace(saved.config.model, pre_lnorm=False)
    with pytest.raises(CheckpointError, match="pre_lnorm True there, False here"):
        saved.load_model(TransformerXL(other))
    longer = TransformerXL(dataclasses.replace(saved.config.model, mem_len=99))
    saved.load_model(longer)
    same = TransformerXL(saved.config.model)
    saved.load_model(same)
    assert all(map(torch.equal, longer.parameters(), same.parameters()))


def test_a_given_model_section_replaces_the_presets() -> None:
    model = ModelConfig(vocab_size=9, n_layer=3, pre_lnorm=True)
    assert from_preset(["demo"], model).model == model
    changed = from_preset(["demo", "model.n_layer=4", "train.lr=1"], model)
    assert changed.model == dataclasses.replace(model, n_layer=4)
    assert changed.train.lr == 1
