"""The calls that launch every shipped Triton kernel: all configurations, dtypes and flags."""

from __future__ import annotations

import collections
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
    """A launch.

    Attributes:
        name: of the first call and the kernel.
        launch: for one architecture.
        calls: all calls with a launch that compiles to the same code.
    """

    name: str
    launch: Launch
    calls: list[Call]


def shipped_calls() -> list[Call]:
    """All calls."""
    from tools.gates import shipped_adaptive, shipped_attention

    return [*shipped_attention.calls(), *shipped_adaptive.calls()]


def shipped_launches(calls: Sequence[Call], arch: int) -> list[Shipped]:
    """The launches of the calls on sm_`arch`; of those that compile to the same code, the first."""
    found: dict[str, Shipped] = {}
    names: collections.Counter[str] = collections.Counter()
    for call in calls:
        with recording(arch) as recorded:
            call.run()
        for launch in recorded:
            code = launching.kernel_hash(launch)
            if code not in found:
                kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
                name = f"{call.name}/{kernel}"
                names[name] += 1
                suffix = f"#{names[name]}" if names[name] > 1 else ""
                found[code] = Shipped(name + suffix, launch, [])
            found[code].calls.append(call)
    return list(found.values())


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Within it launches are recorded, with the limits of a device of this architecture."""
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
