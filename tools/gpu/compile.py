"""Stage "compile": the native part, and in all processes the kernels that later stages launch.

Triton keeps a compiled kernel in its cache, where the other stages' processes find it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
import triton

from tools.gates.checks import SHARED_LIMIT
from tools.gates.shipped import attention, recording, shipped_calls, shipped_launches
from tools.gpu import native_build, sweep
from tools.gpu.stages import Context
from txl_kernels.backends.triton import launch_table
from txl_kernels.backends.triton.launching import Launch

Limits = tuple[tuple[int, int], int]  # compute capability, bytes of shared memory per block
REHEARSED: Limits = ((9, 0), 232448)

# Filled before the worker processes are forked: launches cannot be pickled.
_launches: list[Launch] = []


def run(context: Context) -> None:
    """Results: seconds by kernel, the native build, and "ready" once parity's are compiled.

    Raises:
        AssertionError: something was not compiled.
    """
    device = context.device
    limits = REHEARSED if context.is_rehearsal else launch_table.device_limits(device)
    names, _launches[:] = zip(*launches(limits)[: 1 if context.is_rehearsal else None], strict=True)
    seconds, failed = context.results.setdefault("seconds", {}), []
    fork = multiprocessing.get_context("fork")
    with fork.Pool(len(os.sched_getaffinity(0))) as pool, ThreadPoolExecutor(1) as thread:
        compiled = pool.imap(_compile, range(len(names)))
        native = thread.submit(native_build.build, context)
        for number, name in enumerate(names, 1):
            try:
                seconds[name], error = compiled.next(max(0.1, context.seconds_left() - 1))
            except multiprocessing.TimeoutError:
                failed.append(f"time ran out at {name}")
                break
            failed += [f"{name}: {error}"] if error else []
            if number == len(names) or names[number].startswith("sweep/"):
                context.results["ready"] = ["parity"]
            context.save()
        context.results["native"] = native.result()
    context.results["summary"] = [f"{len(seconds)} kernels", native.result(), *failed]
    assert not failed, f"{len(failed)} kernels were not compiled"


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


def launches(limits: Limits) -> list[tuple[str, Launch]]:
    """Name and launch of every kernel, the headline calls' before the sweep's."""
    (major, minor), shared = limits
    arch = 10 * major + minor
    calls = [call for call in shipped_calls() if call.headline or "/float16/" in call.name]
    with mock.patch.dict(SHARED_LIMIT, {arch: shared}):
        found = [(each.name, each.launch) for each in shipped_launches(calls, arch)]
        with recording(arch):
            row_class = launch_table.launch_class(torch.device("meta"))
        for D, kernel in itertools.product(sweep.HEAD_SIZES, sweep.KERNELS):
            for config in sweep.candidates(kernel, row_class, D, shared):
                with sweep.configured(kernel, row_class, D, config), recording(arch) as recorded:
                    attention(D=D)
                name = f"sweep/{kernel}/D{D}/{tuple(config)}"
                found += [(name, x) for x in recorded if x.kernel.__name__ == f"_{kernel}_kernel"]
    return found
