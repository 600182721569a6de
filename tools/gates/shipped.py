"""The calls that launch every shipped Triton kernel: each configuration, dtype and flag that matters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tools.gates.checks import SHARED_LIMIT
from txl_kernels.backends.triton import launch_table, launching
from txl_kernels.backends.triton.launching import Launch


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
        name: op, dtype and configuration, such as "rel_attention/bfloat16/train_d64".
        run: makes the call on tensors of the device "meta", forward and backward.
        headline: whether it is a common case, which CI compiles too.
    """

    name: str
    run: Callable[[], Any]
    headline: bool = False


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A launch with a name, such as "rel_attention/bfloat16/train_d64/rel_attention_bwd_dkdv"."""

    name: str
    launch: Launch


def shipped_calls() -> list[Call]:
    """All calls."""
    from tools.gates import shipped_adaptive, shipped_attention

    return [*shipped_attention.calls(), *shipped_adaptive.calls()]


def launches(calls: Sequence[Call], arch: int) -> list[Shipped]:
    """What the calls launch on sm_`arch`; launches that compile to the same code are listed once.

    Raises:
        ValueError: two calls have the same name.
    """
    if len({call.name for call in calls}) < len(calls):
        raise ValueError("two shipped calls have the same name")
    found: dict[str, Shipped] = {}
    for call in calls:
        names: set[str] = set()
        with recording(arch) as recorded:
            call.run()
        for launch in recorded:
            code = launching.kernel_hash(launch)
            if code in found:
                continue
            kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
            name = f"{call.name}/{kernel}"
            n = 1 + sum(other == name or other.startswith(f"{name}#") for other in names)
            names.add(name if n == 1 else f"{name}#{n}")
            found[code] = Shipped(name if n == 1 else f"{name}#{n}", launch)
    return list(found.values())


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Within it the Triton ops see a device of this architecture, and their launches are recorded."""
    limits = divmod(arch, 10), SHARED_LIMIT[arch]
    with (
        mock.patch.object(launch_table, "device_limits", return_value=limits),
        mock.patch.object(torch, "addmm", _addmm_without_storage),
        launching.recording(GPUTarget("cuda", arch, 32)) as recorded,
    ):
        yield recorded


def _addmm_without_storage(
    x: Tensor, a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """A product with the same shape: torch 2.11 refuses `out_dtype` of a sum on meta tensors."""
    return torch.mm(a, b, **({} if out_dtype is None else {"out_dtype": out_dtype}), out=out)
