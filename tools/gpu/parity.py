"""Stage "parity": the headline calls against float64, with all gradients, at the timed lengths.

Two heads, bfloat16 and float16. New memory holds NaN; three runs must return the same bits, under
deterministic algorithms. By default the sums for r's gradient are atomic: that kernel is compared
too, in one run.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import headline
from benchmarks.inputs import AttentionShape
from benchmarks.softmax_inputs import random_softmax
from tools.gpu.stages import Context
from txl_kernels import backends, rel_attention, resolve
from txl_kernels.backends import verification
from txl_kernels.backends.verification import kernels as hashing
from txl_kernels.testing import (
    RelAttentionCase,
    check_adaptive_softmax,
    check_rel_attention,
    check_rel_attention_output,
)
from txl_kernels.testing.poison import filled_with_nan

RUNS = 3
LONG, LAST_QUERIES = 8192, 256  # of longer segments only the last queries are compared
# The sliding window of 2k tokens runs the same kernels as that of 8k.
ATTENTION = tuple(s for s in headline.ATTENTION if s.name != "inkling_sliding_2k")
DTYPES = (torch.bfloat16, torch.float16)

Check = Callable[[], None]
DETERMINISTIC = functools.partial(filled_with_nan, deterministic=True)
DEFAULT = functools.partial(filled_with_nan, deterministic=False)


def run(context: Context) -> None:
    """Results: for each call the seconds it took, or why it failed or did not run; "verified", the
    hashes of the kernels that passed.

    Raises:
        AssertionError: a result is wrong, or nothing was compared.
    """
    calls: dict[str, str] = context.results.setdefault("calls", {})
    verified: dict[str, str] = context.results.setdefault("verified", {})
    failed = []
    for name, backend, refusal, check in checks(context.device):
        start = time.perf_counter()
        if refusal is not None or context.seconds_left() < 1:
            calls[name] = f"not run: {refusal or 'no time was left'}"
            continue
        try:
            with recorded_kernels(backend, context.device) as kernels:
                check()
            verified |= kernels
            calls[name] = f"passed in {time.perf_counter() - start:.1f} s"
        except Exception as error:
            calls[name] = f"{type(error).__name__}: {error}"
            failed.append(f"{name}: {calls[name]}")
        context.save()
    n_passed = sum(result.startswith("passed") for result in calls.values())
    others = [f"{name}: {how}" for name, how in calls.items() if not how.startswith("passed")]
    context.results["summary"] = [f"{n_passed} of {len(calls)} calls passed", *others]
    context.save()
    assert not failed, "; ".join(failed)
    assert n_passed, "no backend runs any of the calls"


@contextlib.contextmanager
def recorded_kernels(backend: str, device: torch.device) -> Iterator[dict[str, str]]:
    """Within it "auto" means `backend`, without a self-test; the dict receives {hash: label} of the
    kernels that calls launch."""
    kernels: dict[str, str] = {}

    def examined(call: Any, where: torch.device, _exports: bool) -> str:
        for found in hashing.hashes(call, where):
            kernels.update(found)
        return ""  # as if they had passed

    with (
        mock.patch.dict(backends._AUTO, {device.type: (backend,)}),
        mock.patch.dict(verification._verdicts, clear=True),
        mock.patch.object(verification, "_examined", examined),
    ):
        yield kernels


def checks(device: torch.device) -> Iterator[tuple[str, str, str | None, Check]]:
    """Name and backend of each call, why that backend cannot run it here, and its check."""
    names = ("triton", "native") if device.type == "cuda" else ("native",)
    for dtype in DTYPES:
        for shape in ATTENTION:
            case = attention_case(shape if device.type == "cuda" else shape.tiny())
            for backend in names if shape is headline.DECODE else names[:1]:
                yield _attention(case, shape.name, backend, dtype, device)
        yield _softmax(names[0], dtype, device)


def attention_case(shape: AttentionShape) -> RelAttentionCase:
    """One batch row and two heads of a headline shape."""
    options: dict[str, Any] = {"causal": shape.causal, "offset": shape.offset}
    if shape.window is not None:
        options["window"] = (shape.window, None)
    return RelAttentionCase(
        shape.name,
        B=1,
        H=2,
        Tq=shape.Tq,
        Tm=shape.Tm,
        D=shape.D,
        R=shape.n_rows,
        r_heads=shape.rel_extent is None,
        key_lens=None if shape.key_lens is None else [shape.key_lens[0]],
        options=options,
    )


def _attention(
    case: RelAttentionCase, name: str, backend: str, dtype: torch.dtype, device: torch.device
) -> tuple[str, str, str | None, Check]:
    decodes = name == headline.DECODE.name
    sizes = {"Tq": case.Tq, "D": case.D, "needs_grad": not decodes}
    refusal = _refusal("rel_attention", backend, dtype, device, **sizes)

    def check() -> None:
        if decodes:
            check_rel_attention_output(case, dtype, _repeated, str(device))
            return
        last = LAST_QUERIES if case.Tq > LONG else None
        call = functools.partial(check_rel_attention, case, "auto", dtype, str(device))
        call(last_queries=last, runs=RUNS, within=DETERMINISTIC)
        call(last_queries=last, within=DEFAULT)

    return f"{name}/{_word(dtype)}/{backend}", backend, refusal, check


def _repeated(**call: Any) -> tuple[Tensor, Tensor]:
    """The output of a forward pass, whose runs return the same bits."""
    with torch.no_grad(), DETERMINISTIC():
        results = [rel_attention(**call, return_lse=True) for _ in range(RUNS)]
    for name, first, *others in zip(("out", "lse"), *results, strict=True):
        same = all(torch.equal(first, other) for other in others)
        assert same, f"{name} has other bits in a second run"
    out, lse = results[0]
    return out, lse


def _softmax(
    backend: str, dtype: torch.dtype, device: torch.device
) -> tuple[str, str, str | None, Check]:
    op, shape = "adaptive_loss", headline.SOFTMAX
    shape = shape if device.type == "cuda" else shape.tiny()

    def check() -> None:
        inputs = random_softmax(shape, dtype).convert(dtype, str(device))
        tails: list[Any] = [
            (projection, weight, None)
            for projection, weight in zip(inputs.projections, inputs.tail_weights, strict=True)
        ]
        given = (inputs.hidden, inputs.target, (None, *inputs[2:4]), tails)
        check_adaptive_softmax(op, given, shape.cutoffs, "auto", runs=RUNS, within=DETERMINISTIC)

    refusal = _refusal(op, backend, dtype, device, needs_grad=True)
    name = f"{op}/{headline.SOFTMAX.name}/{_word(dtype)}/{backend}"
    return name, backend, refusal, check


def _refusal(
    op: str, backend: str, dtype: torch.dtype, device: torch.device, **call: Any
) -> str | None:
    return resolve(op, backend=backend, device=device, dtype=dtype, **call).reason


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
