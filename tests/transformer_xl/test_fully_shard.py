"""Two gloo processes under `fully_shard` train, score and write as one process does. This file is
also the script that each process runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from transformer_xl.config import ModelConfig
from transformer_xl.generation import generate
from transformer_xl.key_value_window import unsupported_reason
from transformer_xl.model import TransformerXL
from transformer_xl.sampling import Sampling

CONFIG = ModelConfig(
    vocab_size=30,
    cutoffs=(10, 20),
    div_val=2,
    tie_projs=(False, True, True),
    n_layer=2,
    d_model=16,
    n_head=2,
    d_head=8,
    d_inner=16,
    mem_len=6,
    dropout=0.0,
    init_std=0.3,
)


@pytest.mark.slow
def test_two_sharded_processes_train_score_and_write_as_one() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(Path(__file__))], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def train(model: TransformerXL, segments: tuple[Tensor, ...]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    memory = None
    for segment in segments:
        output = model(segment[:, :-1], memory, segment[:, 1:])
        memory = output.memory
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def score_and_write(model: TransformerXL, tokens: Tensor) -> tuple[Tensor, Tensor]:
    model.eval()
    with torch.no_grad():
        log_probs = model.log_probs(model(tokens).hidden)
    written = torch.stack(list(generate(model, tokens, 4, sampling=Sampling(temperature=0))), dim=1)
    return log_probs, written


def process(rank: int) -> None:
    torch.manual_seed(0)
    alone, sharded = TransformerXL(CONFIG).double(), TransformerXL(CONFIG).double()
    sharded.load_state_dict(alone.state_dict())
    for layer in sharded.layers:
        fully_shard(layer)
    fully_shard(sharded)
    register_fsdp_forward_method(sharded, "log_probs")

    # Each process owns two of four streams; the mean of their losses is the loss of all four.
    segments = torch.randint(0, 30, (4, 24)).split(8, dim=1)
    train(alone, segments)
    train(sharded, tuple(segment[2 * rank : 2 * rank + 2] for segment in segments))
    expected = dict(alone.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert isinstance(parameter, DTensor), name
        torch.testing.assert_close(
            parameter.full_tensor(), expected[name], msg=lambda text, name=name: f"{name}: {text}"
        )
    assert unsupported_reason(sharded) == "sharded parameters"
    assert unsupported_reason(alone) is None
    torch.testing.assert_close(
        score_and_write(sharded, segments[0]), score_and_write(alone, segments[0])
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    process(dist.get_rank())
    dist.destroy_process_group()
    # Without a teardown: a reduction issued in backward holds a Python object, and the thread of
    # gloo that drops it aborts the process if the interpreter is being torn down meanwhile.
    os._exit(0)
