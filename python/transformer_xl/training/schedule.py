"""Learning rates by step: linear warm-up, then cosine, inverse square root, plateau or constant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformer_xl.config import TrainConfig


class Schedule:
    """The learning rate of each step, counted from 1.

        warm-up     lr · step / warmup_step            while step ≤ warmup_step
        cosine      eta_min + (lr − eta_min)/2 · (1 + cos(π · done)), where
                    done = (step − warmup_step) / (max_step − warmup_step)
        inv_sqrt    lr / √step; in its warm-up lr · step / warmup_step^1.5: the rates meet there
        dev_perf    lr · decay_rate^n, no lower than lr_min; n grows by one when the validation
                    loss has not improved for more than `patience` validations running
        constant    lr

    The warm-up is taken off the cosine, as in the original's TensorFlow code (in its PyTorch code
    the rate jumps onto a cosine that began at step 0).
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._best = math.inf
        self._not_better = 0
        self._decays = 0

    def at(self, step: int) -> float:
        """The learning rate of step `step`."""
        config = self.config
        warmup = config.warmup_step
        if config.scheduler == "inv_sqrt":
            return config.lr * (step / warmup**1.5 if step < warmup else 1 / math.sqrt(step))
        if step < warmup:
            return config.lr * step / warmup
        if config.scheduler == "cosine":
            done = min(1.0, (step - warmup) / max(1, config.max_step - warmup))
            return (
                config.eta_min + (config.lr - config.eta_min) * (1 + math.cos(math.pi * done)) / 2
            )
        if config.scheduler == "dev_perf":
            return max(config.lr * config.decay_rate**self._decays, min(config.lr, config.lr_min))
        return config.lr

    def observe(self, valid_loss: float) -> None:
        """Record a validation loss in nats; only "dev_perf" depends on it."""
        if valid_loss < self._best:
            self._best, self._not_better = valid_loss, 0
            return
        self._not_better += 1
        if self._not_better > self.config.patience:
            self._decays += 1
            self._not_better = 0

    def state_dict(self) -> dict[str, Any]:
        """The results of the validations so far, for JSON; "best" is infinite before the first."""
        return {"best": self._best, "not_better": self._not_better, "decays": self._decays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; JSON holds null for an infinite "best"."""
        self._best = math.inf if state["best"] is None else state["best"]
        self._not_better = state["not_better"]
        self._decays = state["decays"]
