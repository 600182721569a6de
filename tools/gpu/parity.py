"""Stage "parity": the headline calls against float64, with all gradients, at the timed lengths.

Two heads, bfloat16 and float16. New memory holds NaN. Under deterministic algorithms three runs
must return the same bits; by default, where the sums for r's gradient are atomic, there is one run.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import headline
from benchmarks.inputs import AttentionShape
from benchmarks.softmax_inputs import random_softmax
from tools.gpu.stages import Context
from txl_kernels import backends, rel_attention, resolve
from txl_kernels.backends import verification
from txl_kernels.backends.verification import kernels
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
DETERMINISTIC = functools.partial(filled_with_nan, deterministic=True)
DEFAULT = functools.partial(filled_with_nan, deterministic=False)


class Call(NamedTuple):
    """A headline call; `options` are the arguments of `resolve`."""

    name: str
    op: str
    backend: str
    options: dict[str, Any]
    check: Callable[[], None]


def run(context: Context) -> None:
    """Results: for each call the seconds it took, or why it failed or did not run; "verified", the
    hashes of the kernels that passed.

    Raises:
        AssertionError: a result is wrong, or nothing was compared.
    """
    found: dict[str, str] = context.results.setdefault("calls", {})
    verified: dict[str, str] = context.results.setdefault("verified", {})
    for call in calls(context.device):
        start, reason = time.perf_counter(), "no time was left"
        if context.seconds_left() > 1:
            reason = resolve(call.op, backend=call.backend, **call.options).reason or ""
        try:
            if not reason:
                with recorded_kernels(call.backend, context.device) as hashes:
                    call.check()
                verified |= hashes
            passed = f"passed in {time.perf_counter() - start:.1f} s"
            found[call.name] = f"not run: {reason}" if reason else passed
        except Exception as error:
            found[call.name] = f"failed: {type(error).__name__}: {error}"
        context.save()
    others = [f"{name}: {text}" for name, text in found.items() if not text.startswith("passed")]
    n_passed = len(found) - len(others)
    context.results["summary"] = [f"{n_passed} of {len(found)} calls passed", *others]
    context.save()
    failed = [text for text in others if ": failed: " in text]
    assert not failed, "; ".join(failed)
    assert n_passed, "nothing was compared"


@contextlib.contextmanager
def recorded_kernels(backend: str, device: torch.device) -> Iterator[dict[str, str]]:
    """Within it "auto" means `backend`, without a self-test; the dict receives {hash: label} of the
    kernels that calls launch."""
    found: dict[str, str] = {}

    def examined(call: Any, where: torch.device, _exports: bool) -> str:
        for hashes in kernels.hashes(call, where):
            found.update(hashes)
        return ""  # as if they had passed

    with (
        mock.patch.dict(backends._AUTO, {device.type: (backend,)}),
        mock.patch.dict(verification._verdicts, clear=True),
        mock.patch.object(verification, "_examined", examined),
    ):
        yield found


def calls(device: torch.device) -> Iterator[Call]:
    """All calls; on a CPU with tiny shapes."""
    on_gpu = device.type == "cuda"
    names = ("triton", "native") if on_gpu else ("native",)
    for dtype in (torch.bfloat16, torch.float16):
        word, softmax = str(dtype).removeprefix("torch."), headline.SOFTMAX
        options: dict[str, Any] = {"device": device, "dtype": dtype, "needs_grad": True}
        for shape in ATTENTION:
            case, decodes = _case(shape if on_gpu else shape.tiny()), shape is headline.DECODE
            check = functools.partial(_attention, case, decodes, dtype, str(device))
            sizes = options | {"Tq": case.Tq, "D": case.D, "needs_grad": not decodes}
            for name in names if decodes else names[:1]:
                yield Call(f"{shape.name}/{word}/{name}", "rel_attention", name, sizes, check)
        softmax = softmax if on_gpu else softmax.tiny()
        check = functools.partial(_softmax, softmax, dtype, str(device))
        yield Call(f"{softmax.name}/{word}/{names[0]}", "adaptive_loss", names[0], options, check)


def _case(shape: AttentionShape) -> RelAttentionCase:
    """One batch row and two heads."""
    options: dict[str, Any] = {"causal": shape.causal, "offset": shape.offset}
    if shape.window is not None:
        options["window"] = (shape.window, None)
    lens = None if shape.key_lens is None else [shape.key_lens[0]]
    sizes = {"B": 1, "H": 2, "Tq": shape.Tq, "Tm": shape.Tm, "D": shape.D, "R": shape.n_rows}
    r_heads = shape.rel_extent is None
    return RelAttentionCase(shape.name, **sizes, r_heads=r_heads, key_lens=lens, options=options)


def _attention(case: RelAttentionCase, decodes: bool, dtype: torch.dtype, device: str) -> None:
    if decodes:
        check_rel_attention_output(case, dtype, _repeated, device)
        return
    last = LAST_QUERIES if case.Tq > LONG else None
    check = functools.partial(check_rel_attention, case, "auto", dtype, device, last_queries=last)
    check(runs=RUNS, within=DETERMINISTIC)
    check(within=DEFAULT)


def _repeated(**call: Any) -> tuple[Tensor, Tensor]:
    """The output of a forward pass, whose runs return the same bits."""
    with DETERMINISTIC():
        first, *others = (rel_attention(**call, return_lse=True) for _ in range(RUNS))
    for other in others:
        assert all(map(torch.equal, first, other)), "another run has other bits"
    return first[0], first[1]


def _softmax(shape: Any, dtype: torch.dtype, device: str) -> None:
    inputs = random_softmax(shape, dtype).convert(dtype, device)
    pairs = zip(inputs.projections, inputs.tail_weights, strict=True)
    tails: list[Any] = [(projection, weight, None) for projection, weight in pairs]
    head: Any = (None, inputs.head_weight, inputs.head_bias)
    given = (inputs.hidden, inputs.target, head, tails)
    options: dict[str, Any] = {"runs": RUNS, "within": DETERMINISTIC}
    check_adaptive_softmax("adaptive_loss", given, shape.cutoffs, "auto", **options)
