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

from txl_kernels.testing.aot.gates import Gate
from txl_kernels.testing.aot.record import Launch, recording

ARCHITECTURES = (80, 90)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is known of one kernel of a call.

    Attributes:
        gate: what its machine code must hold, from its launch.
        passes: through its main loop, over all programs, from its launch; None: not modelled.
        n_bytes: that it must read and write at least once.
    """

    gate: Callable[[Launch], Gate]
    passes: Callable[[Launch], float] | None = None
    n_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an op.

    Attributes:
        name: op, dtype and what is special, such as "rel_attention/bfloat16/train_d64".
        run: makes it, on tensors of the device "meta".
        kernels: by function name, all that it may launch.
        in_ci: whether the tests compile it; `make gates` compiles every call.
        flop: useful ones by the kernels' group; empty where no speed is modelled.
    """

    name: str
    run: Callable[[], Any]
    kernels: Mapping[str, Kernel]
    in_ci: bool = False
    flop: Mapping[str, float] = dataclasses.field(default_factory=dict)


def launches(call: Call, arch: int) -> list[tuple[str, Launch]]:
    """The launches of a call on sm_`arch`, by name; two that are compiled alike are one.

    Raises:
        KeyError: it launches a kernel that `call.kernels` does not name.
    """
    with recording(arch) as found, running_on(arch):
        call.run()
    named: dict[str, Launch] = {}
    for launch in found:
        if launch.name not in call.kernels:
            raise KeyError(f"{call.name}: no gate for kernel {launch.name}")
        same = [n for n, other in named.items() if _alike(launch, other)]
        if not same:
            n = sum(other.name == launch.name for other in named.values())
            suffix = f"#{n + 1}" if n else ""
            named[f"{call.name}/{launch.name}{suffix}"] = launch
    return list(named.items())


@contextlib.contextmanager
def running_on(arch: int) -> Iterator[None]:
    """Within it torch says that its device has compute capability `arch`: launchers choose by it."""
    capability = (arch // 10, arch % 10)
    with mock.patch.object(torch.cuda, "get_device_capability", lambda *_: capability):
        yield


def shipped_calls() -> list[Call]:
    """All of them."""
    from txl_kernels.testing.aot import shipped_attention

    return shipped_attention.calls()


def _alike(one: Launch, other: Launch) -> bool:
    return (
        one.kernel is other.kernel
        and one.signature == other.signature
        and one.constants == other.constants
        and one.attributes == other.attributes
        and one.options == other.options
        and one.n_programs == other.n_programs
    )
