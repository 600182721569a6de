"""Stage "parity": every named case of every op against float64, in float32, float16, bfloat16.

The cases are dealt out to several processes, since most of the time is the compiler's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import device
from benchmarks.gpu.stages import ROOT
from txl_kernels import resolve
from txl_kernels.testing import REL_ATTENTION_CASES, check_rel_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("triton", "native")
MOST_WORKERS = 8

Check = tuple[str, Callable[[], None]]


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Results: the numbers of checks, and a sentence for each that failed.

    Raises:
        Unavailable: no CUDA device.
        AssertionError: a check failed.
    """
    results["checks"] = len(list(checks("cuda")))
    save()
    device.require()
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    passed, refused, failures = 0, {}, []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.json" for n in range(workers)]
        children = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(n), str(workers), str(file)], cwd=ROOT
            )
            for n, file in enumerate(files)
        ]
        for child, file in zip(children, files, strict=True):
            child.wait()
            record = json.loads(file.read_text()) if file.exists() else {}
            if child.returncode or not record:
                failures.append(f"a worker ended with status {child.returncode}")
            passed += record.get("passed", 0)
            refused |= record.get("refused", {})
            failures += record.get("failures", [])
            results |= {"passed": passed, "refused": refused, "failures": failures}
            save()
    assert not failures, f"{len(failures)} of {results['checks']} checks failed: {failures[0]}"
    assert passed, "no backend serves any case here"


def checks(device_type: str) -> Iterator[Check]:
    """Each as its name and what raises AssertionError where it does not hold."""
    for case in REL_ATTENTION_CASES:
        for dtype in DTYPES:
            for backend in BACKENDS:
                name = f"rel_attention {case} {_short(dtype)} {backend}"
                yield name, functools.partial(_rel_attention, case, dtype, backend, device_type)


def work(n: int, workers: int, path: Path) -> None:
    """Every `workers`-th check from the n-th on; counts and failures go to `path`."""
    passed, refused, failures = 0, {}, []
    for name, check in list(checks("cuda"))[n::workers]:
        try:
            check()
        except NotServedError as reason:
            refused[name] = str(reason)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
        else:
            passed += 1
        record = {"passed": passed, "refused": refused, "failures": failures}
        path.write_text(json.dumps(record))


class NotServedError(Exception):
    """`resolve`'s sentence on a case that a backend does not serve."""


def _rel_attention(case: Any, dtype: torch.dtype, backend: str, device_type: str) -> None:
    _, reason = resolve(
        "rel_attention",
        backend=backend,
        device=device_type,
        dtype=dtype,
        Tq=case.Tq,
        D=case.D,
        Dv=case.Dv,
        needs_grad=True,
        uses=case.uses,
    )
    if reason is not None:
        raise NotServedError(reason)
    check_rel_attention(case, backend, dtype, device_type)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
