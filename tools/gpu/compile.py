"""Stage "compile": the native part, and in all processes the kernels that later stages launch.

Triton keeps a compiled kernel in its cache, where the other stages' processes find it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
import triton

from tools.gates.checks import SHARED_LIMIT
from tools.gates.shipped import attention, recording, shipped_calls, shipped_launches
from tools.gpu import memory, native_build, sweep
from tools.gpu.stages import Context
from txl_kernels.backends.triton import launch_table
from txl_kernels.backends.triton.launching import Launch

Limits = tuple[tuple[int, int], int]  # compute capability, bytes of shared memory per block
REHEARSED: Limits = ((9, 0), 232448)
NLL = "adaptive_nll/bfloat16/wt103_large"  # which is timed too

# Filled before the worker processes are forked: launches cannot be pickled.
_launches: list[Launch] = []


def run(context: Context) -> None:
    """Results: seconds by kernel; "ready" once all is built that parity runs.

    Raises:
        AssertionError: something was not compiled.
    """
    limits = REHEARSED if context.is_rehearsal else launch_table.device_limits(context.device)
    names, _launches[:] = zip(*launches(limits)[: 1 if context.is_rehearsal else None], strict=True)
    n_first = sum(not name.startswith(("sweep/", "others/")) for name in names)
    seconds, failed = context.results.setdefault("seconds", {}), []
    fork = multiprocessing.get_context("fork")
    with fork.Pool(len(os.sched_getaffinity(0))) as pool, ThreadPoolExecutor(1) as thread:
        compiled = pool.imap(_compile, range(len(names)))
        native = thread.submit(native_build.build, context)
        # Its small model has other shapes: this compiles its kernels and tests them.
        small_model = threading.Thread(
            target=memory.graph_difference, args=(context.device,), daemon=True
        )
        small_model.start()
        for name in names:
            try:
                seconds[name], error = compiled.next(max(0.1, context.seconds_left() - 1))
            except multiprocessing.TimeoutError:
                failed.append(f"time ran out at {name}")
                break
            failed += [f"{name}: {error}"] if error else []
            if len(seconds) >= n_first and native.done():
                context.results["ready"] = ["parity"]
            context.save()
        summary = [f"{len(seconds)} kernels compiled, {native.result()}", *failed]
        context.results["summary"] = summary
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


def launches(limits: Limits) -> list[tuple[str, Launch]]:
    """Name and launch of every kernel: parity's and the timings', the sweep's, then the others."""
    (major, minor), shared = limits
    arch = 10 * major + minor
    calls = shipped_calls()
    first = [x for x in calls if x.headline or "/float16/" in x.name or x.name == NLL]
    others = [call for call in calls if call.name.startswith("adaptive") and call not in first]
    for call in first.copy():  # as parity and the timings make them
        if call.name.startswith("rel_attention/bfloat16/"):
            changes = [{"B": 1, "H": 2, "dtype": x} for x in (torch.bfloat16, torch.float16)]
        else:
            is_softmax = call.name.startswith(("adaptive_loss/", "adaptive_nll/"))
            changes = [{"biases": False}] * is_softmax
        for changed in changes:
            first.append(dataclasses.replace(call, run=functools.partial(call.run, **changed)))
    with mock.patch.dict(SHARED_LIMIT, {arch: shared}):
        found = [(each.name, each.launch) for each in shipped_launches(first, arch)]
        with recording(arch):
            row_class = launch_table.launch_class(torch.device("meta"))
        for D, kernel in itertools.product(sweep.HEAD_SIZES, sweep.KERNELS):
            for config in sweep.candidates(kernel, row_class, D, shared):
                with sweep.configured(kernel, row_class, D, config), recording(arch) as recorded:
                    attention(D=D)
                name = f"sweep/{kernel}/D{D}/{tuple(config)}"
                found += [(name, x) for x in recorded if x.kernel.__name__ == f"_{kernel}_kernel"]
        found += [(f"others/{x.name}", x.launch) for x in shipped_launches(others, arch)]
    return found
