"""FullyShardedDataParallel: a sharded model trains and scores as the model alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from transformer_xl.config import ModelConfig
from transformer_xl.model import TransformerXL


@pytest.fixture
def one_process() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of deprecation, and that one process shards nothing
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_it_trains_as_the_model_alone(one_process: None, use_orig_params: bool) -> None:
    sizes = {"n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 4, "d_inner": 8, "mem_len": 4}
    config = ModelConfig(
        vocab_size=30, cutoffs=(10, 20), div_val=2, dropout=0.0, init_std=0.3, **sizes
    )
    torch.manual_seed(0)
    alone, model = TransformerXL(config), TransformerXL(config)
    model.load_state_dict(alone.state_dict())
    sharded = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    tokens = torch.randint(0, 30, (2, 13))
    losses = []
    for module in (alone, sharded):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        memory = None
        for segment in tokens.split(4, dim=1)[:3]:
            output = module(segment[:, :-1], memory, segment[:, 1:])
            memory = output.memory
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(output.loss.detach())
    torch.testing.assert_close(losses[3:], losses[:3])
