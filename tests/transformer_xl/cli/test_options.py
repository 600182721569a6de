"""Options that several commands have: weights and cache in fewer bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.cli.app import app
from transformer_xl.config import RunConfig
from transformer_xl.data import open_corpus
from transformer_xl.generation import generate
from transformer_xl.model import TransformerXL
from transformer_xl.training import Trainer, join_processes

OPTIONS = ("--weights", "bfloat16", "--cache-dtype", "float32")


@pytest.fixture
def checkpoint(tiny_config: RunConfig, tmp_path: Path) -> Path:
    Trainer(tiny_config, open_corpus(tiny_config.data), join_processes()).save(tmp_path / "saved")
    return tmp_path / "saved"


def succeed(*arguments: object, stdin: str | None = None) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], input=stdin)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def test_protocols_name_weights_and_cache(checkpoint: Path) -> None:
    shown = " ".join(succeed("evaluate", checkpoint, *OPTIONS).split())
    assert "bfloat16, keys and values in float32" in shown
    found = json.loads(succeed("score", checkpoint, "--json", *OPTIONS, stdin="a text"))
    assert found["protocol"].endswith(", bfloat16, keys and values in float32")
    own = json.loads(succeed("score", checkpoint, "--json", stdin="a text"))
    assert own["protocol"].endswith(", float32")
    assert 0 < abs(found["total"]["nats"] / own["total"]["nats"] - 1) < 0.01


def test_a_text_is_written_with_them(checkpoint: Path, tiny_config: RunConfig) -> None:
    model = TransformerXL(tiny_config.model).eval()
    open_checkpoint(checkpoint).load_model(model)
    prompt = torch.tensor([list(b"the")])
    drawn = generate(model.bfloat16(), prompt, 30, seed=4, cache_dtype=torch.float32)
    arguments = ("--prompt", "the", "--length", 30, "--seed", 4, "--json", *OPTIONS)
    (text,) = json.loads(succeed("generate", checkpoint, *arguments))["texts"]
    assert [token["id"] for token in text["tokens"]] == [int(token) for token in drawn]


@pytest.mark.parametrize("command", ["evaluate", "score", "generate"])
def test_without_torchao_one_sentence_names_it(
    command: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # importing it raises
    result = CliRunner().invoke(app, [command, str(checkpoint), "--weights", "int8"])
    assert result.exit_code == 2
    message = "error weights: int8 needs the package torchao, which is not installed"
    assert message in " ".join(result.stderr.split())
