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
from benchmarks.gpu.adaptive_parity import check_adaptive
from benchmarks.gpu.stages import ROOT
from txl_kernels import rel_shift, resolve
from txl_kernels.testing import (
    ADAPTIVE_SOFTMAX_CASES,
    DECODE_CASES,
    REL_ATTENTION_CASES,
    AdaptiveSoftmaxCase,
    RelAttentionCase,
    check_rel_attention,
    check_rel_attention_output,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("triton", "native")
MOST_WORKERS = 8

Check = tuple[str, Callable[[], None]]


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Results: the numbers of checks, and a sentence for each that failed.

    Raises:
        UnavailableError: no CUDA device.
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
    for dtype in DTYPES:
        for backend in BACKENDS:
            kind = f"{str(dtype).removeprefix('torch.')} {backend}"
            where = (backend, dtype, device_type)
            for case in REL_ATTENTION_CASES:
                yield f"rel_attention {case} {kind}", functools.partial(_attention, case, *where)
            for case in DECODE_CASES:
                yield f"decode {case} {kind}", functools.partial(_decoding, case, *where)
            yield f"rel_shift {kind}", functools.partial(_shift, *where)
            for softmax in ADAPTIVE_SOFTMAX_CASES:
                for op in ("adaptive_loss", "adaptive_nll"):
                    check = functools.partial(_adaptive, softmax, op, *where)
                    yield f"{op} {softmax} {kind}", check


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


def _require(op: str, backend: str, dtype: torch.dtype, device_type: str, **call: Any) -> None:
    _, reason = resolve(op, backend=backend, device=device_type, dtype=dtype, **call)
    if reason is not None:
        raise NotServedError(reason)


def _attention(
    case: RelAttentionCase, backend: str, dtype: torch.dtype, device_type: str, grad: bool = True
) -> None:
    sizes = {"Tq": case.Tq, "D": case.D, "Dv": case.Dv, "uses": case.uses}
    _require("rel_attention", backend, dtype, device_type, needs_grad=grad, **sizes)
    check = check_rel_attention if grad else check_rel_attention_output
    check(case, backend, dtype, device_type)


def _decoding(case: RelAttentionCase, backend: str, dtype: torch.dtype, device_type: str) -> None:
    _attention(case, backend, dtype, device_type, grad=False)


def _shift(backend: str, dtype: torch.dtype, device_type: str) -> None:
    """Copies, so the same bits as the reference's, gradient too."""
    _require("rel_shift", backend, dtype, device_type, needs_grad=True)
    for n_rows, n_keys, offset in ((70, 70, 16), (33, 90, 40), (300, 257, -5)):
        x = torch.randn(2, 3, 17, n_rows, device=device_type).to(dtype).requires_grad_()
        out, due = (
            rel_shift(x, n_keys=n_keys, offset=offset, backend=name)
            for name in (backend, "reference")
        )
        dout = torch.randn_like(out)
        grads = [torch.autograd.grad(y, x, dout)[0] for y in (out, due)]
        assert torch.equal(out, due), "another result than the reference's"
        assert torch.equal(*grads), "another gradient than the reference's"


def _adaptive(
    case: AdaptiveSoftmaxCase, op: str, backend: str, dtype: torch.dtype, device_type: str
) -> None:
    _require(op, backend, dtype, device_type, needs_grad=True)
    check_adaptive(case, op, backend, dtype, device_type)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
