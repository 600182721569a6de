"""Learning rates against their formulas."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from transformer_xl.config import TrainConfig
from transformer_xl.training.schedule import Schedule

CONFIG = TrainConfig(lr=2e-3, max_step=100, warmup_step=10, eta_min=1e-4)


def rates(config: TrainConfig) -> list[float]:
    schedule = Schedule(config)
    return [schedule.at(step) for step in range(1, config.max_step + 1)]


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "dev_perf"])
def test_warm_up_is_linear(scheduler: str) -> None:
    found = rates(dataclasses.replace(CONFIG, scheduler=scheduler))
    assert found[:10] == pytest.approx([2e-3 * step / 10 for step in range(1, 11)])


def test_cosine_begins_where_the_warm_up_ends() -> None:
    expected = [1e-4 + (2e-3 - 1e-4) / 2 * (1 + math.cos(math.pi * i / 90)) for i in range(91)]
    assert rates(CONFIG)[9:] == pytest.approx(expected)


def test_cosine_without_warm_up_is_torchs() -> None:
    config = dataclasses.replace(CONFIG, warmup_step=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.max_step, config.eta_min)
    expected = []
    for _ in range(config.max_step):
        optimizer.step()
        peer.step()
        expected.append(peer.get_last_lr()[0])
    assert rates(config) == pytest.approx(expected)


def test_inverse_square_root_peaks_at_the_end_of_the_warm_up() -> None:
    found = rates(dataclasses.replace(CONFIG, scheduler="inv_sqrt"))
    assert found[:9] == pytest.approx([2e-3 * step / 10**1.5 for step in range(1, 10)])
    assert found[9:] == pytest.approx([2e-3 / math.sqrt(step) for step in range(10, 101)])
    assert max(found) == found[9]


def test_plateau_decays_after_more_than_patience_validations_without_gain() -> None:
    config = dataclasses.replace(
        CONFIG, scheduler="dev_perf", warmup_step=0, patience=1, decay_rate=0.5, lr_min=6e-4
    )
    schedule = Schedule(config)
    seen = []
    for loss in (3.0, 2.0, 2.5, 2.5, 2.4, 2.3, 1.0, 1.5, 1.5):
        schedule.observe(loss)
        seen.append(schedule.at(50))
    assert seen == pytest.approx([2e-3, 2e-3, 2e-3, 1e-3, 1e-3, 6e-4, 6e-4, 6e-4, 6e-4])


def test_plateau_follows_torchs() -> None:
    config = dataclasses.replace(CONFIG, scheduler="dev_perf", warmup_step=0, patience=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=2, threshold=0.0, eps=0.0
    )
    schedule = Schedule(config)
    generator = torch.Generator().manual_seed(0)
    for loss in torch.rand(60, generator=generator).tolist():
        schedule.observe(loss)
        peer.step(loss)
        assert schedule.at(1) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_state_survives_json() -> None:
    config = dataclasses.replace(CONFIG, scheduler="dev_perf", warmup_step=0)
    schedule = Schedule(config)
    for loss in (1.0, 2.0, 3.0):
        schedule.observe(loss)
    other = Schedule(config)
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert other.at(5) == schedule.at(5) == 2e-3 * 0.25
    fresh = Schedule(config)
    fresh.load_state_dict(json.loads(json.dumps(Schedule(config).state_dict())))
    assert fresh.at(5) == 2e-3
