"""The kernel launches of a call, noted instead of run: on tensors of the device "meta"."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as Triton's launcher would specialise it.

    Attributes:
        kernel: the JIT function.
        signature: type of each argument, such as "*bf16"; "constexpr" where it is compiled in.
        constants: values compiled in, by argument path: constexprs, and integers that are 1.
        attributes: what is known of the others, such as divisibility by 16.
        options: num_warps, num_stages and the rest of the compiler's options.
        grid: programs along each axis.
        values: the arguments that are numbers, by name.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Any
    grid: tuple[int, int, int]
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return str(self.kernel.__name__)

    @property
    def constexprs(self) -> dict[str, Any]:
        """Values of the arguments annotated `tl.constexpr`, by name."""
        names = self.kernel.arg_names
        return {names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}

    @property
    def n_programs(self) -> int:
        """Programs of the whole grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


class _NoDevice:
    """Stands where Triton's driver would: it knows its target, and runs nothing."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Within it a Triton kernel that is launched is noted in the list, and not run.

    Args:
        arch: what the launcher is told it runs on, such as 90 for sm_90.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(
            backend, kwargs, bound, specialization, options
        )
        size = grid(bound) if callable(grid) else grid
        values = {name: v for name, v in bound.items() if isinstance(v, (bool, int, float))}
        launches.append(
            Launch(self, signature, constants, attributes, options, (*size, 1, 1)[:3], values)
        )

    run, before = JITFunction.run, driver._active
    JITFunction.run = note
    driver.set_active(_NoDevice(target))
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = before
