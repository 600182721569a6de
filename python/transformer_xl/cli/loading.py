"""Loads the model and the vocabulary of a checkpoint, to read or write text with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from transformer_xl.checkpoint import open_checkpoint
from transformer_xl.config import RunConfig
from transformer_xl.data import Vocabulary
from transformer_xl.model import TransformerXL
from transformer_xl.quantization import Weights, convert_weights
from transformer_xl.reader import Reader
from transformer_xl.training.precision import Autocast, autocast


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model on its device, with its vocabulary and configuration.

    `weights`: the kind of weights to which it was converted; None: those of the checkpoint.
    `cache_dtype`: the dtype of cached keys and values; None: that of the computation.
    """

    model: TransformerXL
    vocabulary: Vocabulary
    config: RunConfig
    device: torch.device
    weights: Weights | None = None
    cache_dtype: torch.dtype | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        device: torch.device,
        *,
        weights: Weights | None = None,
        cache_dtype: str | None = None,
    ) -> LoadedModel:
        """Load a checkpoint, or the last one of a run, and convert its weights.

        Raises the errors of `open_checkpoint` and `convert_weights`.
        """
        saved = open_checkpoint(path)
        saved.check_sizes()
        model = TransformerXL(saved.config.model)
        saved.load_model(model)
        model.to(device).eval()
        if weights is not None:
            convert_weights(model, weights)
        dtype = None if cache_dtype is None else getattr(torch, cache_dtype)
        return cls(model, saved.vocabulary, saved.config, device, weights, dtype)

    def reader(self, batch_size: int) -> Reader:
        """The memory of texts that the model reads and writes."""
        return Reader(self.model, batch_size, cache_dtype=self.cache_dtype)

    def autocast(self, given: Autocast | None, trained: Autocast) -> torch.autocast:
        """Autocast as `given`; if None, off for converted weights and else as in training."""
        return autocast(given or ("off" if self.weights else trained), self.device)


def default_device() -> torch.device:
    """The first GPU; the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
