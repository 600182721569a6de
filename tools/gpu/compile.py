"""Stage "compile": the native part, and in all processes the kernels that later stages launch.

Triton keeps a compiled kernel in its cache, where the other stages' processes find it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
import time
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from tools.gates.shipped import shipped_calls
from tools.gates.shipped_attention import Attention
from tools.gpu import native_build, sweep
from tools.gpu.stages import Context, UnavailableError
from txl_kernels.backends.triton import launch_table, launching
from txl_kernels.backends.triton.launching import Launch

Limits = tuple[tuple[int, int], int]  # compute capability, bytes of shared memory per block
REHEARSED: Limits = ((9, 0), 232448)


def run(context: Context) -> None:
    """Results: seconds by kernel, or the compiler's error; "ready" once parity's are compiled.

    Raises:
        AssertionError: something was not compiled.
    """
    rehearsal = context.device.type == "cpu"
    limits = REHEARSED if rehearsal else launch_table.device_limits(context.device)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        native = thread.submit(native_build.build, context)
        failed = _compile_launches(context, limits, most=1 if rehearsal else None)
        try:
            context.results["native"] = native.result()
        except UnavailableError as reason:
            context.results["native"] = f"not built: {reason}"
    n_kernels = len(context.results["seconds"])
    context.results["summary"] = [f"{n_kernels} kernels", context.results["native"], *failed]
    context.save()
    assert not failed, f"{len(failed)} of {n_kernels} kernels were not compiled"


def _compile_launches(context: Context, limits: Limits, most: int | None) -> list[str]:
    """Compiles in several processes; returns the errors."""
    names = [name for name, _ in launches(limits)]
    n_headline = sum(not name.startswith("sweep/") for name in names)
    seconds = context.results.setdefault("seconds", {})
    failed = []
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        tasks = [(limits, number) for number in range(len(names))][:most]
        results = pool.imap(_compile, tasks)
        for number, name in enumerate(names[:most]):
            try:
                seconds[name], error = results.next(max(0.1, context.seconds_left() - 1))
            except multiprocessing.TimeoutError:
                failed.append(f"time ran out before {name}")
                break
            if error:
                failed.append(f"{name}: {error}")
            if number + 1 == n_headline:
                context.results["ready"] = ["parity"]
            context.save()
    return failed


def _compile(task: tuple[Limits, int]) -> tuple[float, str | None]:
    """Seconds, and the compiler's error if there is one."""
    start, error = time.perf_counter(), None
    launch = launches(task[0])[task[1]][1]
    try:
        source = triton.compiler.ASTSource(
            launch.kernel, launch.signature, launch.constants, launch.attributes
        )
        triton.compile(source, target=launch.target, options=dict(vars(launch.options)))
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"[:300]
    return round(time.perf_counter() - start, 2), error


@functools.cache
def launches(limits: Limits) -> list[tuple[str, Launch]]:
    """Name and launch of every kernel, the headline calls' before the sweep's, each once."""
    (major, minor), shared = limits
    found: dict[str, tuple[str, Launch]] = {}

    def record(name: str, call: object, only: str = "") -> None:
        with launching.recording(GPUTarget("cuda", 10 * major + minor, 32)) as recorded:
            call()
        for launch in recorded:
            kernel = launch.kernel.__name__
            if only in kernel:
                found.setdefault(launching.kernel_hash(launch), (f"{name}/{kernel}", launch))

    with mock.patch.object(launch_table, "device_limits", return_value=limits):
        for call in shipped_calls():
            if call.headline or "float16" in call.name:
                record(call.name, call.run)
        row_class = launch_table.launch_class(torch.device("meta"))
        for D, kernel in itertools.product(sweep.HEAD_SIZES, (sweep.FWD, sweep.DKDV, sweep.DQDR)):
            key = sweep.row_key(kernel, row_class, D)
            shipped = launch_table.rows()[key]
            for config in sweep.candidates(kernel, D, shipped, shared):
                with mock.patch.dict(launch_table.rows(), {key: config}):
                    name = f"sweep/D{D}/{'x'.join(map(str, config))}"
                    record(name, Attention(D=D).run, only=kernel)
    return list(found.values())
