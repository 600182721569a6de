"""Two gloo processes that train a patched model under DDP or FSDP2; test_tools.py starts them.

    python -m torch.distributed.run --nproc-per-node=2 processes.py CASE ddp|fsdp2

Each process has one row of the batch; after three steps the parameters must be those of one
process that has both rows and the original code.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from transformer_xl.integrations import patch

spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
models = importlib.util.module_from_spec(spec)
sys.modules["models"] = models
spec.loader.exec_module(models)


def train(model: torch.nn.Module, kwargs: dict[str, object]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        out = models.run(model, kwargs)
        (out * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def main(name: str, wrapper: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    single, model = models.build(name), models.build(name)
    patch(model)
    kwargs, _ = models.CASES[name].inputs([13, 13])
    del kwargs["attention_mask"]
    if wrapper == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        for layer in model.layer if name == "xlnet" else model.layers:
            fully_shard(layer)
        fully_shard(model)
    rows = {k: x[rank : rank + 1] if isinstance(x, Tensor) else x for k, x in kwargs.items()}
    train(model, rows)
    train(single, kwargs)
    expected = dict(single.named_parameters())
    for key, parameter in model.named_parameters():
        actual = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        x = expected[key.removeprefix("module.")]
        torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-5, msg=lambda m: f"{key}: {m}")  # noqa: B023
    if rank == 0:
        print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
