"""The calls that stand for everything shipped: each configuration, dtype and flag that matters.

A call runs on tensors without storage; every kernel it launches is compiled for each architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from txl_kernels.testing.aot.gates import Gate
from txl_kernels.testing.aot.record import Launch, recording
from txl_kernels.testing.asked import Asked

ARCHITECTURES = (80, 90)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is known of one kernel of a call.

    Attributes:
        gate: what its machine code must hold, from its launch and the architecture.
        passes: through its main loop, over all programs, from its launch.
        flop: of its products, where passes are not counted but follow from these.
        part: of the call: "forward", "backward", or "forward+backward" for both in one.
    """

    gate: Callable[[Launch, int], Gate]
    passes: Callable[[Launch], float] | None = None
    flop: float | None = None
    part: str = "forward+backward"


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
        name: op, dtype and what is special, such as "rel_attention/bfloat16/train_d64".
        run: makes it, on tensors of the device "meta".
        kernels: by function name, all that it may launch.
        in_ci: whether the tests compile it; `make gates` compiles every call.
        modelled: whether its time is in the documentation.
        only: where given, the kernels that matter; the others are not compiled.
        flop: useful ones, by part; empty where no rate is modelled.
        least_bytes: that any way of doing it must move, where memory bounds it; else 0.
        asked: by part, what it must reach on a GPU.
    """

    name: str
    run: Callable[[], Any]
    kernels: Mapping[str, Kernel]
    in_ci: bool = False
    modelled: bool = False
    only: tuple[str, ...] = ()
    flop: Mapping[str, float] = dataclasses.field(default_factory=dict)
    least_bytes: int = 0
    asked: Mapping[str, Asked] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The launches of a call that are compiled to the same code.

    `library_flop` are those of the call's matrix products by torch's own library; they stand with
    the first of its kernels alone.
    """

    name: str
    launches: tuple[Launch, ...]
    library_flop: int


def launches(call: Call, arch: int) -> list[Recorded]:
    """What a call launches on sm_`arch`.

    Raises:
        KeyError: it launches a kernel that `call.kernels` does not name.
    """
    library = FlopCounterMode(display=False)
    with recording(arch) as found, running_on(arch), library:
        call.run()
    kinds: list[list[Launch]] = []
    for launch in found:
        if launch.name not in call.kernels:
            raise KeyError(f"{call.name}: no gate for kernel {launch.name}")
        same = next((kind for kind in kinds if launch.compiles_like(kind[0])), None)
        if same is None:
            kinds.append([launch])
        else:
            same.append(launch)
    recorded = []
    for n, kind in enumerate(kinds):
        earlier = sum(other[0].name == kind[0].name for other in kinds[:n])
        suffix = f"#{earlier + 1}" if earlier else ""
        flop = library.get_total_flops() if n == 0 else 0
        recorded.append(Recorded(f"{call.name}/{kind[0].name}{suffix}", tuple(kind), flop))
    return recorded


@contextlib.contextmanager
def running_on(arch: int) -> Iterator[None]:
    """Within it torch says that its device has this compute capability: launchers go by it."""
    capability = divmod(arch, 10)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch, "addmm", _addmm_without_storage),
    ):
        yield


def _addmm_without_storage(
    x: Tensor, a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None
) -> Tensor:
    """For meta tensors, where torch 2.11 fails on a sum with `out_dtype`: a product alone, which
    has the same shape and counts as much."""
    return torch.mm(a, b, **({} if out_dtype is None else {"out_dtype": out_dtype}), out=out)


def shipped_calls() -> list[Call]:
    """All of them."""
    from txl_kernels.testing.aot import shipped_adaptive, shipped_attention

    return [*shipped_attention.calls(), *shipped_adaptive.calls()]
