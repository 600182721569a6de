"""accelerate's environment variables and default configuration do not change a run's numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend

from transformer_xl.config import RunConfig, override
from transformer_xl.data import open_corpus
from transformer_xl.training.processes import join_processes
from transformer_xl.training.trainer import Trainer

# `accelerate launch` passes its default configuration file on in these variables.
SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
}


@pytest.fixture
def joined() -> Iterator[Callable[[], Accelerator]]:
    """`join_processes` as the first call of a process: accelerate keeps what it read first."""

    def join() -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        return join_processes()

    yield join
    AcceleratorState._reset_state(reset_partial_state=True)


def two_losses(config: RunConfig, accelerator: Accelerator) -> list[float]:
    trainer = Trainer(config, open_corpus(config.data), accelerator)
    losses = []
    for _ in range(2):
        trainer.advance()
        losses.append(trainer.mean_loss())
    return losses


def test_settings_of_accelerate_change_no_loss(
    tiny_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    joined: Callable[[], Accelerator],
) -> None:
    # Without clipping and with a large eps, Adam's step depends on the size of the gradient.
    config = override(tiny_config, {"train.clip": 0, "train.eps": 1.0, "train.warmup_step": 0})
    expected = two_losses(config, joined())
    for name, value in SETTINGS.items():
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            assert two_losses(config, joined()) == expected, name
            assert os.environ[name] == value


def test_nothing_is_compiled_by_accelerate(
    monkeypatch: pytest.MonkeyPatch, joined: Callable[[], Accelerator]
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert joined().state.dynamo_plugin.backend == DynamoBackend.NO
