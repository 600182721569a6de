"""Two gloo processes under DDP, a cluster without targets on each: nothing waits, gradients are
those of one process. This file is also the script that each process runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from transformer_xl.integrations import AdaptiveLogSoftmaxWithLoss
from transformer_xl.nn import AdaptiveEmbedding, AdaptiveSoftmax

V, CUTOFFS = 30, (8, 15)
TARGETS = torch.tensor([[0, 7, 9, 14, 3], [16, 29, 1, 2, 20]])  # the first row has no last cluster


class LanguageModel(nn.Module):
    """An embedding and the softmax tied to it."""

    def __init__(self, div_val: int) -> None:
        super().__init__()
        self.embedding = AdaptiveEmbedding(V, 8, 8, CUTOFFS, div_val)
        self.softmax = AdaptiveSoftmax(V, 8, 8, CUTOFFS, div_val)
        pairs = zip(self.softmax.out_layers, self.embedding.emb_layers, strict=True)
        for layer, table in pairs:
            layer.weight = table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.softmax(self.embedding(tokens.flip(-1)), tokens)
        return loss


class Classifier(nn.Module):
    """torch's module in place, which with torch's own would wait for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, 8)
        self.softmax = AdaptiveLogSoftmaxWithLoss(8, V, CUTOFFS, div_value=2.0)

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.softmax(
            self.table(tokens.flip(-1)).flatten(0, -2), tokens.flatten()
        ).loss
        return loss


@pytest.mark.slow
def test_a_cluster_unused_on_one_process_holds_up_no_other() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(Path(__file__))], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def process(rank: int) -> None:
    for make in (lambda: LanguageModel(1), lambda: LanguageModel(2), Classifier):
        torch.manual_seed(0)
        alone, shared = make().double(), make().double()
        shared.load_state_dict(alone.state_dict())
        wrapped = DistributedDataParallel(shared)  # and no find_unused_parameters
        for _ in range(3):
            alone(TARGETS).backward()
            wrapped(TARGETS[rank : rank + 1]).backward()
        for (name, due), got in zip(alone.named_parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(got.grad, due.grad, msg=lambda text, n=name: f"{n}: {text}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    process(dist.get_rank())
    dist.destroy_process_group()
    # Without a teardown: a reduction issued in backward holds a Python object, and the thread of
    # gloo that drops it aborts the process if the interpreter is being torn down meanwhile.
    os._exit(0)
