"""Stages "compile" and "compile_sweep": the native part, and on all cores the Triton kernels.

Triton keeps a compiled kernel in its cache, where the other stages' processes find it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
import triton

from tools.gates.checks import SHARED_LIMIT
from tools.gates.shipped import attention, recording, shipped_calls, shipped_launches
from tools.gpu import memory, sweep
from tools.gpu.programs import find_program, run_program, tail
from tools.gpu.stages import BUILD, ROOT, Context, UnavailableError
from txl_kernels.backends.triton import launch_table
from txl_kernels.backends.triton.launching import Launch

Limits = tuple[tuple[int, int], int]  # compute capability, bytes of shared memory per block
Named = Sequence[tuple[str, Launch]]
REHEARSED: Limits = ((9, 0), 232448)
NLL = "adaptive_nll/bfloat16/wt103_large"  # which is timed too

# Filled before the worker processes are forked: launches cannot be pickled.
_launches: list[Launch] = []


def run(context: Context) -> None:
    """The native part and the kernels of parity, timings and memory. Results: seconds by kernel.

    Raises:
        AssertionError: something was not compiled.
    """

    def small_model() -> str:
        # It has other shapes: this compiles its kernels and tests them.
        return f"graph replay: relative difference {memory.graph_difference(context.device):.1e}"

    _compile_all(context, headline_launches, lambda: build_native(context), small_model)


def run_sweep(context: Context) -> None:
    """The kernels of the stage "sweep". Results and errors are those of `run`."""
    _compile_all(context, sweep_launches)


def _compile_all(
    context: Context, find: Callable[[Limits], Named], *beside: Callable[[], str]
) -> None:
    """Compiles the launches, in a rehearsal only the first one; runs the other functions beside."""
    limits = REHEARSED if context.is_rehearsal else launch_table.device_limits(context.device)
    names, _launches[:] = zip(*find(limits)[: 1 if context.is_rehearsal else None], strict=True)
    seconds, failed = context.results.setdefault("seconds", {}), []
    fork = multiprocessing.get_context("fork")
    with fork.Pool(len(os.sched_getaffinity(0))) as pool, ThreadPoolExecutor() as threads:
        others = [threads.submit(function) for function in beside]  # after the fork
        compiled = pool.imap(_compile, range(len(names)))
        for name, (seconds[name], error) in zip(names, compiled, strict=True):
            failed += [f"{name}: {error}"] if error else []
            context.results["summary"] = [f"{len(seconds)} of {len(names)} compiled", *failed]
            context.save()
        context.results["summary"] += [other.result() for other in others]
    assert not failed, "not all kernels were compiled"


def _compile(number: int) -> tuple[float, str | None]:
    """Seconds, and the compiler's error if there is one."""
    launch, start, error = _launches[number], time.perf_counter(), None
    try:
        source = triton.compiler.ASTSource(
            launch.kernel, launch.signature, launch.constants, launch.attributes
        )
        triton.compile(source, target=launch.target, options=dict(vars(launch.options)))
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"[:300]
    return round(time.perf_counter() - start, 2), error


def headline_launches(limits: Limits) -> Named:
    """The headline calls' launches as the gates check them, and as parity and timings make them."""
    (major, minor), shared = limits
    calls = shipped_calls()
    calls = [x for x in calls if x.headline or "/float16/" in x.name or x.name == NLL]
    for call in calls.copy():
        changes: list[dict[str, object]] = []
        if call.name.startswith("rel_attention/bfloat16/"):
            changes = [{"B": 1, "H": 2, "dtype": x} for x in (torch.bfloat16, torch.float16)]
        elif call.name.startswith(("adaptive_loss/", "adaptive_nll/")):
            changes = [{"biases": False}]
        for changed in changes:
            calls.append(dataclasses.replace(call, run=functools.partial(call.run, **changed)))
    with mock.patch.dict(SHARED_LIMIT, {10 * major + minor: shared}):
        return [(each.name, each.launch) for each in shipped_launches(calls, 10 * major + minor)]


def sweep_launches(limits: Limits) -> Named:
    """The launches of every configuration of the sweep."""
    (major, minor), shared = limits
    found: list[tuple[str, Launch]] = []
    with mock.patch.dict(SHARED_LIMIT, {10 * major + minor: shared}):
        with recording(10 * major + minor):
            row_class = launch_table.launch_class(torch.device("meta"))
        for D, kernel in itertools.product(sweep.HEAD_SIZES, sweep.KERNELS):
            key = sweep.row_key(kernel, row_class, D)
            for config in sweep.candidates(key):
                with sweep.configured(key, config), recording(10 * major + minor) as recorded:
                    attention(D=D)
                name = f"{kernel}/D{D}/{tuple(config)}"
                found += [(name, x) for x in recorded if x.kernel.__name__ == f"_{kernel}_kernel"]
    return found


def build_native(context: Context) -> str:
    """Builds the native part for this GPU alone; returns a line about the build.

    A rehearsal configures a build without CUDA and compiles nothing.

    Raises:
        RuntimeError: the build failed; with the last lines that the tools printed.
    """
    tiny, folder = context.is_rehearsal, BUILD / f"native-{sysconfig.get_config_var('SOABI')}"
    try:
        cmake, ninja = find_program("cmake"), find_program("ninja")
    except UnavailableError as reason:
        return f"native part not built: {reason}"
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "TXL_OUTPUT_DIR": folder / "built" if tiny else ROOT / "txl_kernels",
        "TXL_CUDA": "OFF" if tiny else "AUTO",
        "TXL_CUDA_ARCHITECTURES": "80-real" if tiny else _architecture(context.device),
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defined]
    make = [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())]
    for step in (configure, [*make, "--target", "help"] if tiny else make):
        status, printed = run_program(step, context.seconds_left() - 1)
        if status != 0:
            raise RuntimeError(f"the native build failed or ran out of time:\n{tail(printed, 20)}")
    record = (ROOT / "txl_kernels" / "_native_build.json").read_text(encoding="utf-8")
    return "native part configured" if tiny else f"native part: {' '.join(record.split())}"


def _architecture(device: torch.device) -> str:
    """As CMake writes it; Hopper's own instructions need the suffix "a"."""
    major, minor = torch.cuda.get_device_capability(device)
    return "90a-real" if major == 9 else f"{major}{minor}-real"
