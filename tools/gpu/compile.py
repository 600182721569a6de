"""Stages "compile" and "compile_sweep": the native part, and on all cores the Triton kernels.

Triton keeps a compiled kernel in its cache, where the other stages' processes find it.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

from benchmarks import headline
from tools.gates.checks import SHARED_LIMIT
from tools.gates.compiling import compile_launch
from tools.gates.shipped import attention, recording, shipped_calls
from tools.gpu import memory, sweep
from tools.gpu.programs import find_program, run_program
from tools.gpu.stages import ROOT, Context, UnavailableError
from txl_kernels.backends.triton import launch_table, launching
from txl_kernels.backends.triton.launching import Launch

Named = dict[str, tuple[str, Launch]]  # name and launch, by the hash of the compiled code
REHEARSED = (9, 0), 232448  # compute capability, bytes of shared memory per block
# Which are timed, and compared in parity, without biases of the tails.
SOFTMAX = [f"adaptive_loss/{dtype}/wt103_large" for dtype in ("bfloat16", "float16")]
SOFTMAX += ["adaptive_nll/bfloat16/wt103_large"]

# Filled before the worker processes are forked: launches cannot be pickled.
_launches: list[Launch] = []


def run(context: Context) -> None:
    """The native part and the kernels of parity, timings and memory. Results: seconds by kernel.

    Raises:
        AssertionError: something was not compiled.
    """
    # The small model has other shapes: a replay compiles its kernels and tests them.
    replay = functools.partial(memory.graph_difference, context.device)
    _compile_all(context, headline_launches, functools.partial(build_native, context), replay)


def run_sweep(context: Context) -> None:
    """The kernels of the stage "sweep". Results and errors are those of `run`."""
    _compile_all(context, sweep_launches)


def _limits(context: Context) -> tuple[tuple[int, int], int]:
    return REHEARSED if context.is_rehearsal else launch_table.device_limits(context.device)


def _compile_all(
    context: Context, find: Callable[[int], Named], *beside: Callable[[], object]
) -> None:
    """Compiles the launches, in a rehearsal only the first one; runs the other functions beside."""
    (major, minor), shared = _limits(context)
    with mock.patch.dict(SHARED_LIMIT, {10 * major + minor: shared}):
        launches = list(find(10 * major + minor).values())[: 1 if context.is_rehearsal else None]
    names, _launches[:] = zip(*launches, strict=True)
    seconds, failed = context.results.setdefault("seconds", {}), []
    fork = multiprocessing.get_context("fork")
    with fork.Pool(len(os.sched_getaffinity(0))) as pool, ThreadPoolExecutor() as threads:
        others = [threads.submit(function) for function in beside]  # after the fork
        compiled = pool.imap(_compile, range(len(names)))
        for name, (seconds[name], error) in zip(names, compiled, strict=True):
            failed += [f"{name}: {error}"] if error else []
            context.save()
        context.results["summary"] = [f"{len(seconds)} kernels", *failed]
        context.results["summary"] += [str(other.result()) for other in others]
    assert not failed, "not all kernels were compiled"


def _compile(number: int) -> tuple[float, str | None]:
    """Seconds, and the compiler's error if there is one."""
    start, error = time.perf_counter(), None
    try:
        compile_launch(_launches[number])
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"[:300]
    return round(time.perf_counter() - start, 2), error


def headline_launches(arch: int) -> Named:
    """The launches of the timings, and of parity with two heads in two dtypes."""
    found: Named = {}
    for shape in headline.ATTENTION:
        sizes = {"Tq": shape.Tq, "Tm": shape.Tm, "D": shape.D, "R": shape.n_rows}
        options = {"causal": shape.causal, "offset": shape.offset, "window_left": shape.window}
        options["tensors"] = ("key_lens",) if shape.key_lens else ()
        options["backward"] = shape is not headline.DECODE
        for B, H, dtype in ((shape.B, shape.H, "bfloat16"), (1, 2, "bfloat16"), (1, 2, "float16")):
            with recording(arch) as recorded:
                attention(B=B, H=H, dtype=getattr(torch, dtype), **sizes, **options)
            _add(found, f"{shape.name}/{dtype}/H{H}", recorded)
    for call in shipped_calls():
        if call.name in SOFTMAX:
            with recording(arch) as recorded:
                call.run(biases=False)
            _add(found, call.name, recorded)
    return found


def sweep_launches(arch: int) -> Named:
    """The launches of every configuration of the sweep."""
    found: Named = {}
    with recording(arch):
        row_class = launch_table.launch_class(torch.device("meta"))
    for D, kernel in itertools.product(sweep.HEAD_SIZES, sweep.KERNELS):
        key = sweep.row_key(kernel, row_class, D)
        for config in sweep.candidates(key):
            with sweep.configured(key, config), recording(arch) as recorded:
                attention(D=D)
            chosen = [x for x in recorded if x.kernel.__name__ == f"_{kernel}_kernel"]
            _add(found, f"D{D}/{tuple(config)}", chosen)
    return found


def _add(found: Named, call: str, launches: list[Launch]) -> None:
    for number, launch in enumerate(launches):
        name = f"{call}/{launch.kernel.__name__}/{number}"
        found.setdefault(launching.kernel_hash(launch), (name, launch))


def build_native(context: Context) -> str:
    """Builds the native part for this GPU alone, or returns why not; a rehearsal prints a help.

    Raises:
        RuntimeError: the build failed; with the last lines that the tools printed.
    """
    try:
        find_program("cmake")
    except UnavailableError as reason:
        return f"native part not built: {reason}"
    (major, minor), _ = _limits(context)
    target = f"{major}{minor}{'a' * (major == 9)}-real"  # "a": with Hopper's own instructions
    os.environ["CMAKE_ARGS"] = f"-DTXL_CUDA_ARCHITECTURES={target}"
    option = "--help" if context.is_rehearsal else "--inplace"
    command = [sys.executable, "setup.py", "build_ext", option]
    status, lines = run_program(command, context.seconds_left() - 1)
    if status != 0:
        raise RuntimeError("\n".join([f"{command} ended with {status}", *lines[-20:]]))
    record = ROOT / "txl_kernels" / "_native_build.json"
    return f"native part for {target}: {record.read_text(encoding='utf-8').strip()}"
