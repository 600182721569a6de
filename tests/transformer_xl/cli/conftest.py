"""The command `generate` with an untrained model of any vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from transformer_xl.cli.app import app
from transformer_xl.cli.loading import LoadedModel
from transformer_xl.config import RunConfig, override
from transformer_xl.data.vocabularies import Vocabulary
from transformer_xl.model import TransformerXL

Load = Callable[[Vocabulary], LoadedModel]


@pytest.fixture
def load(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Load:
    """An untrained model of a vocabulary, which every command then opens."""

    def made(vocabulary: Vocabulary) -> LoadedModel:
        torch.manual_seed(0)
        config = override(tiny_config, {"model.vocab_size": len(vocabulary)})
        model = TransformerXL(config.model).eval()
        loaded = LoadedModel(model, vocabulary, config, torch.device("cpu"))
        monkeypatch.setattr(LoadedModel, "open", lambda path, device, **_: loaded)
        return loaded

    return made


@pytest.fixture
def generate(load: Load) -> Callable[..., Result]:
    """The command with an untrained model; 5 tokens from one seed by default."""

    def run(vocabulary: Vocabulary, *arguments: object, typed: str | None = None) -> Result:
        load(vocabulary)
        fixed = ["generate", "run", "--length", "5", "--seed", "1"]
        return CliRunner().invoke(app, [*fixed, *map(str, arguments)], input=typed)

    return run
