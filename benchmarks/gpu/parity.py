"""Stage "parity": every named case of every op against float64, in bfloat16, float16, float32.

The cases are dealt out to several processes, since most of the time is the compiler's: 460 kernels
of attention alone, a second or two each.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention, device
from benchmarks.gpu.adaptive_parity import check_adaptive, check_embedding
from benchmarks.gpu.stages import ROOT, write_json
from benchmarks.inputs import AttentionShape
from txl_kernels import rel_attention, rel_shift, resolve
from txl_kernels.testing import (
    ADAPTIVE_SOFTMAX_CASES,
    DECODE_CASES,
    REL_ATTENTION_CASES,
    AdaptiveSoftmaxCase,
    RelAttentionCase,
    check_rel_attention,
    check_rel_attention_output,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("triton", "native")
MOST_WORKERS = 16
POLL_SECONDS = 1.0
SAME = 2**-7  # relative error of the norm between two ways to the same bfloat16 numbers

# As large as what is timed, of few heads: offsets, many blocks, sums over many rows.
AT_SCALE = (
    RelAttentionCase("train_d64", B=1, H=2, Tq=2048, Tm=2048, D=64, options={"causal": True}),
    RelAttentionCase("train_d128", B=1, H=2, Tq=2048, Tm=2048, D=128, options={"causal": True}),
    RelAttentionCase("speech", B=1, H=2, Tq=3000, Tm=0, R=5999, D=64, key_lens=[2900]),
    RelAttentionCase(
        "dropout", B=2, H=1, Tq=1024, Tm=1024, D=64, options={"causal": True, "dropout_p": 0.1}
    ),
)

Check = tuple[str, Callable[[], None]]


def run(results: dict[str, Any], save: Callable[[], None]) -> None:
    """Results: the numbers of checks, and a sentence for each that failed; while it goes on too.

    Raises:
        UnavailableError: no CUDA device.
        AssertionError: a check failed.
    """
    results["checks"] = len(list(checks("cuda")))
    save()
    device.require()
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{n}.json" for n in range(workers)]
        children = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(n), str(workers), str(file)], cwd=ROOT
            )
            for n, file in enumerate(files)
        ]
        while any(child.poll() is None for child in children):
            time.sleep(POLL_SECONDS)
            results |= gathered(files)
            save()
        results |= gathered(files)
        results["failures"] += [
            f"a worker ended with status {child.returncode}"
            for child in children
            if child.returncode
        ]
        save()
    failures = results["failures"]
    assert not failures, f"{len(failures)} of {results['checks']} checks failed: {failures[0]}"
    assert results["passed"], "no backend serves any case here"


def gathered(files: Iterable[Path]) -> dict[str, Any]:
    """What the workers have written so far, put together."""
    passed, refused, failures = 0, {}, []
    for file in files:
        record = json.loads(file.read_text()) if file.exists() else {}
        passed += record.get("passed", 0)
        refused |= record.get("refused", {})
        failures += record.get("failures", [])
    return {"passed": passed, "refused": refused, "failures": failures}


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
                check = functools.partial(_embedding, softmax, *where)
                yield f"adaptive_embedding {softmax} {kind}", check
    for dtype in (torch.bfloat16, torch.float16):
        for case in AT_SCALE:
            check = functools.partial(_attention, case, "triton", dtype, device_type)
            yield f"at scale {case} {str(dtype).removeprefix('torch.')} triton", check
    for shape in attention.TRAIN:
        check = functools.partial(_materialised, shape, device_type)
        yield f"materialised {shape.name} bfloat16 triton", check


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
        write_json(path, record)


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
    if grad:
        check_rel_attention(case, backend, dtype, device_type)
    else:
        run = functools.partial(rel_attention, return_lse=True, backend=backend)
        check_rel_attention_output(case, dtype, run, device_type)


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


def _embedding(
    case: AdaptiveSoftmaxCase, backend: str, dtype: torch.dtype, device_type: str
) -> None:
    _require("adaptive_embedding", backend, dtype, device_type, needs_grad=True)
    check_embedding(case, backend, dtype, device_type)


@torch.no_grad()
def _materialised(shape: AttentionShape, device_type: str) -> None:
    """The whole timed shape against the kernel that reads its products with r from memory."""
    _require("rel_attention", "triton", torch.bfloat16, device_type, Tq=shape.Tq, D=shape.D)
    from txl_kernels.backends.triton.rel_attention import rel_attention_fwd_materialised

    where = torch.device(device_type)
    inputs = attention.inputs_on(shape, where, requires_grad=False)
    out = attention.bind(attention.OURS, shape, inputs)[0]()
    due, _lse = rel_attention_fwd_materialised(
        *inputs, *[None] * 6, shape.Tq - 1, False, shape.causal, None, None, (), shape.D**-0.5,
        0.0, 0.0, False,
    )  # fmt: skip
    wrong = float((out.float() - due.float()).norm() / due.float().norm())
    assert wrong <= SAME, f"off by {wrong:.1e} of its norm, {SAME:.1e} is allowed"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
