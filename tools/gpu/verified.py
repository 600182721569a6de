"""Stage "parity", and a record of the kernels that passed: they need no self-test on this GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from tools.gpu import parity as calls
from tools.gpu.stages import Context
from txl_kernels.backends.triton import launching
from txl_kernels.backends.verification.records import write_shipped


def parity(context: Context) -> None:
    """Runs the stage; if all calls passed, writes the kernels' hashes into the package."""
    if context.is_rehearsal:
        return calls.run(context)
    with launched() as kernels:
        calls.run(context)
    context.results["verified"] = kernels
    write_shipped(torch.cuda.get_device_name(context.device), kernels)
    return None


@contextlib.contextmanager
def launched() -> Iterator[dict[str, str]]:
    """Collects the hash and the name of every Triton kernel that is launched within, also in
    autograd's threads."""
    found: dict[str, str] = {}

    def launch(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **named: Any) -> None:
        run(kernel, grid, *arguments, **named)
        target = launching.current_target()
        found[launching.kernel_hash(launching.specialise(kernel, arguments, named, target))] = (
            kernel.__name__
        )

    run = launching.launch
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("txl_kernels.") and getattr(module, "launch", None) is run:
                stack.enter_context(mock.patch.object(module, "launch", launch))
        yield found
