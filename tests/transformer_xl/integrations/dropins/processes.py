"""Two gloo processes that train patched models under DDP, FSDP or FSDP2, for test_distributed.py.

    python -m torch.distributed.run --nproc-per-node=2 processes.py ddp|fsdp|fsdp2 CASE…

Each process has one row of the batch. The losses and, after three steps, the parameters must be
those of one process that has both rows and the original code. Prints each case that is equal.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from transformer_xl.integrations import patch, report, unpatch

spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
models = importlib.util.module_from_spec(spec)
sys.modules["models"] = models
spec.loader.exec_module(models)


def train(model: nn.Module, kwargs: dict[str, object]) -> Tensor:
    """The losses of three steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-2), []
    for _ in range(3):
        out = models.run(model, kwargs)
        loss = (out * torch.linspace(-1, 1, out[0].numel()).view_as(out[0])).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if wrapper == "fsdp":
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)
    for layer in model.layer if hasattr(model, "layer") else model.layers:  # XLNet has layer
        fully_shard(layer)
    return fully_shard(model)


def check_parameters(model: nn.Module, single: nn.Module) -> None:
    expected = dict(single.named_parameters())
    for key, parameter in model.named_parameters():
        actual = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        torch.testing.assert_close(
            actual, expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


def compare(name: str, wrapper: str) -> None:
    rank = dist.get_rank()
    single, own = models.build(name), models.build(name)
    patch(own)
    kwargs, _ = models.CASES[name].inputs([13, 13])
    del kwargs["attention_mask"]
    rows = {k: x[rank : rank + 1] if isinstance(x, Tensor) else x for k, x in kwargs.items()}
    model = wrap(own, wrapper)
    losses = train(model, rows)
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, train(single, kwargs), rtol=1e-4, atol=1e-5)
    is_fsdp = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if is_fsdp else nullcontext():
        check_parameters(own, single)
    assert len(report(own).patched) == models.CASES[name].n_patched
    assert report(own).fallbacks == 0
    for function in (patch, unpatch):
        with pytest.raises(ValueError, match="expected a model before"):
            function(model)


def main(wrapper: str, *names: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name in names:
        compare(name, wrapper)
        if dist.get_rank() == 0:
            print(name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
