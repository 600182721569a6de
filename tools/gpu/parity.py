"""Stage "parity": the headline calls against float64, with all gradients, at the timed lengths.

Two heads, bfloat16 and float16. The GPU tests make the same checks of other calls.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import headline
from benchmarks.cases.adaptive_softmax import arguments
from benchmarks.inputs import AttentionShape
from benchmarks.softmax_inputs import SoftmaxShape, random_softmax
from tools.gpu.runner import Context
from txl_kernels import backends, rel_attention_with_lse, resolve
from txl_kernels.backends import verification
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


def run(context: Context) -> None:
    """Results: for each call the seconds it took, or why it failed or did not run; "verified", the
    hashes of the kernels that passed."""
    found: dict[str, str] = context.results.setdefault("calls", {})
    verified: dict[str, str] = context.results.setdefault("verified", {})
    for name, options, check in calls(context.device):
        start, reason = time.perf_counter(), "no time was left"
        if context.seconds_left() > 1:
            reason = resolve(**options).reason or ""
        auto = mock.patch.dict(backends._AUTO, {context.device.type: (options["backend"],)})
        try:
            if not reason:
                with auto, verification.untested() as hashes:
                    check()
                verified |= hashes
            passed = f"passed in {time.perf_counter() - start:.1f} s"
            found[name] = f"not run: {reason}" if reason else passed
        except Exception as error:
            found[name] = f"failed: {type(error).__name__}: {error}"
        others = [f"{name}: {text}" for name, text in found.items() if "passed in" not in text]
        n_passed = len(found) - len(others)
        context.results["summary"] = [f"{n_passed} of {len(found)} calls passed", *others]
        context.save()
    failed = [text for text in others if ": failed: " in text]
    assert not failed, "; ".join(failed)
    assert n_passed, "nothing was compared"


def calls(device: torch.device) -> Iterator[tuple[str, dict[str, Any], Callable[[], None]]]:
    """Names, arguments of `resolve`, and checks; on a CPU with tiny shapes."""
    on_gpu = device.type == "cuda"
    names = ("triton", "native") if on_gpu else ("native",)
    for dtype in (torch.bfloat16, torch.float16):
        word = str(dtype).removeprefix("torch.")
        options: dict[str, Any] = {"device": device, "dtype": dtype, "needs_grad": True}
        for shape in ATTENTION:
            case, decodes = _case(shape if on_gpu else shape.tiny()), shape is headline.DECODE
            check = check_decoding if decodes else check_attention
            check = functools.partial(check, case, "auto", dtype, device.type)
            sizes = {"op": "rel_attention", "Tq": case.Tq, "D": case.D, "needs_grad": not decodes}
            for name in names if decodes else names[:1]:
                yield f"{shape.name}/{word}/{name}", options | sizes | {"backend": name}, check
        softmax = headline.SOFTMAX if on_gpu else headline.SOFTMAX.tiny()
        check = functools.partial(_check_softmax, softmax, dtype, device.type)
        call = {"op": "adaptive_loss", "backend": names[0]}
        yield f"{softmax.name}/{word}/{names[0]}", options | call, check


def _case(shape: AttentionShape) -> RelAttentionCase:
    """One batch row and two heads; of grouped heads the two share one key head."""
    options: dict[str, Any] = {"causal": shape.causal, "offset": shape.offset}
    if shape.d_rel is not None:
        options["pos_scale"] = 1.0
    if shape.window is not None:
        options["window"] = (shape.window, None)
    lens = None if shape.key_lens is None else [shape.key_lens[0]]
    sizes = {"B": 1, "H": 2, "Tq": shape.Tq, "Tm": shape.Tm, "D": shape.D, "R": shape.n_rows}
    return RelAttentionCase(
        shape.name,
        **sizes,
        Hk=1 if shape.Hk else None,
        Dp=shape.d_rel,
        r_heads=shape.rel_extent is None,
        biases=shape.d_rel is None,
        key_lens=lens,
        options=options,
    )


def check_attention(case: RelAttentionCase, backend: str, dtype: torch.dtype, device: str) -> None:
    """Output and gradients, in new memory that holds NaN.

    Under deterministic algorithms three runs must return the same bits; by default, where the sums
    for r's gradient are atomic, there is one run."""
    last = LAST_QUERIES if case.Tq > LONG else None
    check = functools.partial(check_rel_attention, case, backend, dtype, device, last_queries=last)
    check(runs=RUNS, within=DETERMINISTIC)
    check(within=functools.partial(filled_with_nan, deterministic=False))


def check_decoding(case: RelAttentionCase, backend: str, dtype: torch.dtype, device: str) -> None:
    """The output alone, of runs that return the same bits."""

    def attend(**call: Any) -> tuple[Tensor, Tensor]:
        with DETERMINISTIC():
            first, *others = (rel_attention_with_lse(**call, backend=backend) for _ in range(RUNS))
        for other in others:
            assert all(map(torch.equal, first, other)), "another run has other bits"
        return first[0], first[1]

    check_rel_attention_output(case, dtype, attend, device)


def _check_softmax(shape: SoftmaxShape, dtype: torch.dtype, device: str) -> None:
    call = arguments(shape, random_softmax(shape, dtype).convert(dtype, device))
    head: Any = (None, call["head_weight"], call["head_bias"])
    given = (call["hidden"], call["target"], head, call["tails"])
    options: dict[str, Any] = {"runs": RUNS, "within": DETERMINISTIC}
    check_adaptive_softmax("adaptive_loss", given, shape.cutoffs, "auto", **options)
