"""Every launch of a Triton kernel in this package, and the hash of the kernel that it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as Triton specialises it for a target.

    Attributes:
        kernel: the JIT function.
        signature: type of each argument, such as "*bf16"; "constexpr" for one that is compiled in.
        constants: compiled-in values by argument path: constexprs, and integers that are 1.
        attributes: properties of the other arguments, such as divisibility by 16.
        options: num_warps, num_stages and the other options of the compiler.
        target: the processor, Triton's `GPUTarget`.
        grid: programs along each axis.
        arguments: values by name.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Any
    target: Any
    grid: tuple[int, ...] = ()
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Recorder(threading.local):
    """The launches of this thread that are recorded instead of run; None: they run."""

    launches: list[Launch] | None = None
    target: Any = None
    device: torch.device | None = None


_recorder = _Recorder()


def launch(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **named: Any) -> None:
    """Runs `kernel` with these arguments and options; within `recording` only records the launch.

    All launches in this package go through this function. Products and sums are fused unless the
    caller turns that off: the default depends on Triton's version.
    """
    named = {"enable_fp_fusion": True, **named}
    if _recorder.launches is None:
        kernel[grid](*arguments, **named)
        return
    found = specialise(kernel, arguments, named, _recorder.target)
    _recorder.launches.append(dataclasses.replace(found, grid=grid))


@contextlib.contextmanager
def recording(target: Any, device: torch.device | None = None) -> Iterator[list[Launch]]:
    """Within it this thread's launches are recorded for `target` in the list and do not run.

    Kernels then write nothing: call the ops with tensors of the device "meta".

    Args:
        target: Triton's `GPUTarget`.
        device: the device whose launch configurations are used for "meta" tensors.
    """
    before = vars(_recorder).copy()
    launches: list[Launch] = []
    _recorder.launches, _recorder.target, _recorder.device = launches, target, device
    try:
        yield launches
    finally:
        vars(_recorder).clear()
        vars(_recorder).update(before)


def real_device(device: torch.device) -> torch.device:
    """The device that `recording` names where `device` is "meta", else `device`."""
    if device.type == "meta" and _recorder.device is not None:
        return _recorder.device
    return device


def current_target() -> Any:
    """Triton's `GPUTarget` of the current device."""
    return triton.runtime.driver.active.get_current_target()


def specialise(
    kernel: Any, arguments: tuple[Any, ...], named: Mapping[str, Any], target: Any
) -> Launch:
    """The specialisation that Triton's launcher computes for these arguments on `target`.

    Uses functions inside Triton that the versions 3.6 to 3.9 have.
    """
    backend, bind = _binder(kernel, target)
    options = {**named, "debug": kernel.debug or triton.knobs.runtime.debug}
    bound, specialisation, parsed = bind(*arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialisation, parsed
    )
    return Launch(kernel, signature, constants, attributes, parsed, target, arguments=dict(bound))


@functools.cache
def _binder(kernel: Any, target: Any) -> tuple[Any, Any]:
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def kernel_hash(launch: Launch) -> str:
    """A hash of the code that this launch compiles to, the same on every machine.

    It covers the source with all functions that it calls, the launch configuration, the
    specialisation, the processor and Triton's version.
    """
    options = {
        name: value for name, value in vars(launch.options).items() if name != "extern_libs"
    }  # those are paths on this machine
    parts = (
        launch.kernel.cache_key,
        launch.signature,
        launch.constants,
        launch.attributes,
        options,
        launch.target,
        triton.__version__,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
