"""Stage "sweep": times launch configurations of the attention kernels; the fastest become rows.

`python -m tools.gpu.apply RESULT.json` writes these rows into the launch table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.inputs import AttentionShape, random_inputs
from tools.gpu.ceilings import milliseconds
from tools.gpu.stages import Context, UnavailableError
from txl_kernels import rel_attention
from txl_kernels.backends.triton import interprets, launch_table
from txl_kernels.backends.triton.launch_table import AttentionConfig, Key

FWD, DKDV, DQDR = "rel_attention_fwd", "rel_attention_bwd_dkdv", "rel_attention_bwd_dqdr"
HEAD_SIZES = (64, 128)
MOST = 12  # configurations of a kernel, the shipped one included
TOLERANCE = 2e-2  # relative difference, by the norm, to the shipped configuration's results
GAIN = 0.02  # a row is replaced only if another one is faster by this fraction

Calls = tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]


def run(context: Context) -> None:
    """Results: milliseconds, or the error, of each configuration; the rows that are faster.

    Raises:
        UnavailableError: a rehearsal without Triton's interpreter.
        AssertionError: a configuration computes another result than the shipped one.
    """
    rehearsal = context.device.type == "cpu"
    if rehearsal and not interprets():
        raise UnavailableError("a rehearsal of the sweep needs TRITON_INTERPRET=1")
    limit = 2**30 if rehearsal else launch_table.device_limits(context.device)[1]
    times: dict[str, dict[str, object]] = context.results.setdefault("times_ms", {})
    rows, wrong = context.results.setdefault("rows", []), []
    for D, kernel in itertools.product(HEAD_SIZES[: 1 if rehearsal else None], (FWD, DKDV, DQDR)):
        key = row_key(kernel, launch_table.launch_class(context.device), D)
        shipped = launch_table.rows()[key]
        assert isinstance(shipped, AttentionConfig)
        call = attention_calls(D, context.device)[kernel != FWD]
        expected = call()
        found = times.setdefault(f"{kernel}/D{D}", {})
        fastest, best = math.inf, shipped
        for config in candidates(kernel, D, shipped, limit)[: 2 if rehearsal else None]:
            if context.seconds_left() < 1:
                break
            label = "x".join(map(str, config))
            try:
                with mock.patch.dict(launch_table.rows(), {key: config}):
                    error = max(map(_difference, call(), expected))
                    assert error <= TOLERANCE, f"differs by {error:.1e} from the shipped one"
                    found[label] = took = milliseconds(call, context.device, rep=30)
            except AssertionError as problem:
                found[label] = str(problem)
                wrong.append(f"{kernel}/D{D}/{label} {problem}")
                continue
            except Exception as problem:  # such as too much shared memory
                found[label] = f"{type(problem).__name__}: {problem}"[:200]
                continue
            if took < fastest * (1 - GAIN * (best == shipped)):
                fastest, best = took, config
            context.save()
        if best != shipped:
            row = {"kernel": kernel, "class": key.launch_class, "variant": key.variant}
            why = f"{fastest:.3g} ms; {'x'.join(map(str, shipped))} {found['x'.join(map(str, shipped))]:.3g} ms"
            rows.append(row | {"bits": 16, "head_size": D, **best._asdict(), "why": why})
        context.save()
    context.results["summary"] = [f"{len(rows)} rows are faster than the shipped ones"]
    context.results["summary"] += [
        f"{row['kernel']} D {row['head_size']}: {row['why']}" for row in rows
    ]
    context.save()
    assert not wrong, "; ".join(wrong)


def row_key(kernel: str, row_class: str, D: int) -> Key:
    """The row of a call with 16-bit inputs and no option that changes the row."""
    if row_class == "interpreter":
        return Key(kernel, row_class, "plain")
    return Key(kernel, row_class, "plain", 16, D)


def candidates(kernel: str, D: int, shipped: AttentionConfig, limit: int) -> list[AttentionConfig]:
    """The shipped configuration and those most similar to it that may fit in shared memory."""
    found = [AttentionConfig(*x) for x in itertools.product(*[(32, 64, 128)] * 2, (4, 8), (2, 3))]

    def fits(config: AttentionConfig) -> bool:
        own, other = config[:2] if kernel != DKDV else config[1::-1]
        # A kernel rotates rows that are no longer than its tile has columns.
        return own <= other and 2 * D * (own + 3 * config.num_stages * other) <= limit

    def distance(config: AttentionConfig) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(config, shipped, strict=True))

    others = sorted((x for x in found if x != shipped and fits(x)), key=distance)
    return [shipped, *others[: MOST - 1]]


def attention_calls(D: int, device: torch.device) -> Calls:
    """The forward and the backward pass of a training segment after a memory of its length."""
    tiny = {"B": 1, "H": 2, "Tq": 16, "Tm": 16, "D": 16}
    sizes = tiny if device.type == "cpu" else {"B": 8, "H": 16, "Tq": 2048, "Tm": 2048, "D": D}
    shape = AttentionShape(name="train", causal=True, **sizes)
    inputs = random_inputs(shape, torch.bfloat16, requires_grad=True, device=device)

    def attend() -> Tensor:
        out: Tensor = rel_attention(**inputs._asdict(), causal=True, backend="triton")
        return out

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [attend()]

    out = attend()
    dout = torch.randn_like(out)
    leaves = list(inputs.leaves())
    return forward, lambda: list(torch.autograd.grad(out, leaves, dout, retain_graph=True))


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative, by the norm; infinite where a result is not finite."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf
