"""Two gloo processes that train patched models under DDP, FSDP or FSDP2, for test_distributed.py.

    python -m torch.distributed.run --nproc-per-node=2 processes.py ddp|fsdp|fsdp2 CASE…

Each process has one row of the batch. The losses and, after three steps, the parameters must be
those of one process that has both rows and the original code. Prints each case that is equal. A
case is one of conftest.py; "nemo-" and one of nemo/encoders.py; or "espnet".
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from transformer_xl.integrations import patch, report, unpatch


def load(name: str, path: str) -> ModuleType:
    """A file of this folder as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Work(NamedTuple):
    """A model, a call of it that returns hidden states, and two rows of inputs for the call."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, dict[str, Any]], Tensor]
    inputs: dict[str, Any]
    n_patched: int


def work(name: str) -> Work:
    if name.startswith("nemo-"):
        encoders = load("encoders", "nemo/encoders.py")
        case, inputs = name.removeprefix("nemo-"), encoders.features([13, 13])
        return Work(lambda: encoders.build(case), lambda model, x: model(**x)[0], inputs, 3)
    if name == "espnet":
        classes = load("classes", "espnet/conftest.py").Classes
        encoders = load("espnet_encoders", "espnet/test_encoders.py")
        x = torch.randn(2, 13, 24, generator=torch.Generator().manual_seed(1))
        inputs = {"xs": x, "masks": None}
        return Work(
            lambda: encoders.prepare(classes, name), lambda model, x: model(**x)[0], inputs, 2
        )
    models = load("models", "conftest.py")
    inputs, _ = models.CASES[name].inputs([13, 13])
    del inputs["attention_mask"]
    return Work(lambda: models.build(name), models.run, inputs, models.CASES[name].n_patched)


def train(model: nn.Module, run: Callable[..., Tensor], inputs: dict[str, Any]) -> Tensor:
    """The losses of three steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-2), []
    for _ in range(3):
        out = run(model, inputs)
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
    for names in ("layers", "layer", "encoders"):  # XLNet has layer, ESPnet has encoders
        for layer in getattr(model, names, ()):
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
    build, run, inputs, n_patched = work(name)
    single, own = build(), build()
    patch(own)
    rows = {k: x[rank : rank + 1] if isinstance(x, Tensor) else x for k, x in inputs.items()}
    model = wrap(own, wrapper)
    losses = train(model, run, rows)
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, train(single, run, inputs), rtol=1e-4, atol=1e-5)
    is_fsdp = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if is_fsdp else nullcontext():
        check_parameters(own, single)
    assert len(report(own).patched) == n_patched
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
