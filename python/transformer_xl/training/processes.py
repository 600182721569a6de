"""The processes of a run: their accelerator, shares, agreement, and the lock on its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin, patch_environment

from transformer_xl.checkpoint import CheckpointError
from transformer_xl.data.files import locked

LOCK = ".lock"
# Engines that accelerate selects by its environment alone; a run here only divides rows (DDP).
OTHER_ENGINES = dict.fromkeys(
    (
        f"ACCELERATE_USE_{name}"
        for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
    ),
    "false",
)


def join_processes() -> Accelerator:
    """Return the accelerator of this process: on a GPU if there is one, else on the CPU.

    Precision, gradient accumulation and compilation follow the run's configuration. Therefore
    accelerate's environment variables and its default configuration file do not change them.
    """
    with patch_environment(**OTHER_ENGINES):
        return Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
        )


def share(name: str, rows: int, index: int, parts: int) -> tuple[int, int]:
    """The (start, stop) of part `index` when `rows` rows are split into contiguous parts.

    ValueError, naming the field, if a part would be empty.
    """
    if rows < parts:
        raise ValueError(
            f"{name}: expected at least {parts} rows to share among {parts}, got {rows}"
        )
    return index * rows // parts, (index + 1) * rows // parts


def agreement(accelerator: Accelerator) -> Callable[[bool], bool]:
    """Return a function of one bool that returns whether it was True in any process.

    All processes must call that function equally often. It communicates on the CPU and does not
    wait for work on a GPU, so that a run can call it at every step.
    """
    if accelerator.num_processes == 1:
        return lambda value: value
    group = torch.distributed.new_group(backend="gloo")

    def any_process(value: bool) -> bool:
        flag = torch.tensor(int(value))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)
        return bool(flag)

    return any_process


@contextlib.contextmanager
def only_run_in(
    out: Path, accelerator: Accelerator, any_process: Callable[[bool], bool]
) -> Iterator[None]:
    """Hold the folder `out` for the processes of this run.

    Raises:
        CheckpointError: another run holds it.
    """
    with contextlib.ExitStack() as held:
        taken = False
        if accelerator.is_main_process:
            try:
                held.enter_context(locked(out / LOCK, timeout=0))
            except TimeoutError:
                taken = True
        if any_process(taken):
            raise CheckpointError(
                f"another process trains in {out}; wait for its end, or choose another folder"
            )
        yield
