"""Stages "compile" and "compile_sweep": the native part, and on all cores the Triton kernels.

Triton keeps a compiled kernel in its cache, where the other stages' processes find it.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

from benchmarks import headline
from tools.gates.checks import SHARED_LIMIT
from tools.gates.compiling import compile_launch
from tools.gates.shipped import attention, recording, shipped_calls
from tools.gpu import memory, sweep
from tools.gpu.programs import find_program, run_program
from tools.gpu.runner import Context, UnavailableError
from txl_kernels._rel_attention_call import UNLIMITED
from txl_kernels.backends import native
from txl_kernels.backends import native_installation as installation
from txl_kernels.backends.triton import launch_table, launching
from txl_kernels.backends.triton.launch_table import AttentionConfig
from txl_kernels.backends.triton.launching import Launch

Calls = Iterable[tuple[str, Callable[[], None]]]  # names and functions
REHEARSED = (9, 0), 232448  # compute capability, bytes of shared memory per block

# Filled before the worker processes are forked: launches cannot be pickled.
_launches: list[Launch] = []


def run(context: Context) -> None:
    """The native part and the kernels of parity, timings and memory. Results: seconds by kernel."""
    # The small model has other shapes: a replay compiles its kernels and tests them.
    replay = functools.partial(memory.graph_difference, context.device)
    _compile_all(context, headline_calls(), functools.partial(build_native, context), replay)


def run_sweep(context: Context) -> None:
    """The kernels of the stage "sweep". Results and errors are those of `run`."""
    _compile_all(context, sweep_calls())


def _limits(context: Context) -> tuple[tuple[int, int], int]:
    return REHEARSED if context.is_rehearsal else launch_table.device_limits(context.device)


def _compile_all(context: Context, calls: Calls, *beside: Callable[[], object]) -> None:
    """Compiles the launches, in a rehearsal only the first one; runs the other functions beside."""
    (major, minor), shared = _limits(context)
    with mock.patch.dict(SHARED_LIMIT, {10 * major + minor: shared}):
        found = [*find_launches(calls, 10 * major + minor).values()]
    names, _launches[:] = zip(*found[: 1 if context.is_rehearsal else None], strict=True)
    seconds, failed = context.results.setdefault("seconds", {}), []
    fork = multiprocessing.get_context("fork")
    with fork.Pool(len(os.sched_getaffinity(0))) as pool, ThreadPoolExecutor() as threads:
        others = [threads.submit(function) for function in beside]  # after the fork
        compiled = pool.imap(_compile, range(len(names)))
        for name, (elapsed, error) in zip(names, compiled, strict=True):
            seconds[name] = elapsed
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


def headline_calls() -> Calls:
    """The calls of the timings, and of parity with two heads in two dtypes."""
    for shape in headline.ATTENTION:
        sizes = {"Tq": shape.Tq, "Tm": shape.Tm, "D": shape.D, "Dp": shape.d_rel, "R": shape.n_rows}
        rules = {"offset": shape.offset, "window_right": 0 if shape.causal else UNLIMITED}
        if shape.window is not None:
            rules["window_left"] = shape.window
        call = functools.partial(
            attention,
            **sizes,
            rules=rules,
            numbers={"pos_scale": 1.0} if shape.d_rel else {},
            biases=shape.d_rel is None,
            tensors=("key_lens",) if shape.key_lens else (),
            backward=shape is not headline.DECODE,
        )
        two_heads = {"B": 1, "H": 2, "Hk": 1 if shape.Hk else None}
        all_heads = {"B": shape.B, "H": shape.H, "Hk": shape.Hk}
        for heads, dtype in (
            (all_heads, torch.bfloat16),
            (two_heads, torch.bfloat16),
            (two_heads, torch.float16),
        ):
            changed = functools.partial(call, **heads, dtype=dtype)
            yield f"{shape.name}/{str(dtype).removeprefix('torch.')}/H{heads['H']}", changed
    for softmax in shipped_calls():
        if re.match("adaptive_(loss|nll)/.*float16/wt103_large", softmax.name):
            yield softmax.name, functools.partial(softmax.run, biases=False)


def sweep_calls() -> Calls:
    """A training call with every configuration of the sweep."""
    for D, kernel, config in itertools.product(sweep.HEAD_SIZES, sweep.KERNELS, sweep.CONFIGS):
        yield f"D{D}/{tuple(config)}", functools.partial(_swept, D, kernel, config)


def _swept(D: int, kernel: str, config: AttentionConfig) -> None:
    key = sweep.row_key(kernel, launch_table.launch_class(torch.device("meta")), D)
    with sweep.configured(key, config):
        attention(D=D)


def find_launches(calls: Calls, arch: int) -> dict[str, tuple[str, Launch]]:
    """Name and launch, by the hash of the compiled code."""
    found: dict[str, tuple[str, Launch]] = {}
    for name, call in calls:
        with recording(arch) as recorded:
            call()
        for launch in recorded:
            code = launching.kernel_hash(launch)
            found.setdefault(code, (f"{name}/{launch.kernel.__name__}/{len(found)}", launch))
    return found


def build_native(context: Context) -> str:
    """Builds the native part for this GPU alone, or returns why not; a rehearsal prints a help."""
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
    folder = native.library_path().parent
    places = (folder / installation.RECORD_NAME, folder.parent / installation.RECORD_NAME)
    path = next((path for path in places if path.exists()), None)
    if path is None:  # in a rehearsal, which builds nothing
        return "native part not built: there is no build record"
    record = json.loads(path.read_text(encoding="utf-8"))
    if not record["built"]:
        return f"native part not built: {record['reason']}"
    cuda = record["cuda"]
    without = "" if cuda["built"] else f", without CUDA kernels: {cuda['reason']}"
    return f"native part built for {target}{without}"
