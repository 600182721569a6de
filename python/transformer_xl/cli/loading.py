"""Loads the model and the vocabulary of a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.config import RunConfig
from transformer_xl.data import Vocabulary
from transformer_xl.model import TransformerXL


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model on its device, with its vocabulary and configuration."""

    model: TransformerXL
    vocabulary: Vocabulary
    config: RunConfig
    device: torch.device

    @classmethod
    def open(cls, path: Path, device: torch.device) -> LoadedModel:
        """Load a checkpoint, or the last one of a run. Raises the errors of `open_checkpoint`."""
        saved = open_checkpoint(path)
        saved.check_sizes()
        model = TransformerXL(saved.config.model)
        saved.load_model(model)
        return cls(model.to(device).eval(), saved.vocabulary, saved.config, device)


def default_device() -> torch.device:
    """The first GPU; the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
