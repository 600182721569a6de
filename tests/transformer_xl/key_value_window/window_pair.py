"""A `KeyValueWindow` beside the memory of hidden states that it replaces, for the tests here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer_xl.config import ModelConfig
from transformer_xl.key_value_window import KeyValueWindow
from transformer_xl.memory import Memory
from transformer_xl.model import TransformerXL

SMALL = ModelConfig(
    vocab_size=40, n_layer=3, d_model=12, n_head=2, d_head=5, d_inner=16, mem_len=7, init_std=0.3
)


def built(
    dtype: torch.dtype = torch.float64, backend: str = "auto", **options: Any
) -> TransformerXL:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **options)
    return TransformerXL(config, backend=backend).to(dtype).eval()


def tokens(model: TransformerXL, rows: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, length))


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-11 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Pair:
    """A window and the memory of hidden states that it replaces, with the same rows."""

    def __init__(self, model: TransformerXL, rows: int = 2, **options: Any) -> None:
        self.model = model
        self.memory: Memory = model.init_memory(rows)
        self.window = KeyValueWindow.empty(model, rows, **options)

    @torch.no_grad()
    def read(
        self, length: int, check: Callable[[Tensor, Tensor], None] = close, **options: Any
    ) -> None:
        rows = self.window.batch_size
        segment, targets = tokens(self.model, rows, length), tokens(self.model, rows, length)
        expected = self.model(segment, self.memory, targets, reduction="none", **options)
        actual = self.model(segment, self.window, targets, reduction="none", **options)
        assert actual.memory is self.window
        check(actual.hidden, expected.hidden)
        check(actual.loss, expected.loss)
        self.memory = expected.memory
