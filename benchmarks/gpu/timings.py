"""Stage "timings": our calls beside the ways one would go instead, and the machine's own limits."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import adaptive, attention, device, timing
from benchmarks.gpu.attention import COMPILED_PEERS, OURS, PEERS, PEERS_AT_ONCE, YARDSTICKS
from benchmarks.gpu.timing import Contender
from benchmarks.inputs import AttentionInputs, AttentionShape
from txl_kernels import rel_attention

CASE = "the case itself"  # in the place of a contender: what failed besides
SETS = 2  # of inputs, in turn
GATE = 5e-2  # relative error of the norm against float64 above which a bfloat16 result is another

Save = Callable[[], None]


def run(results: dict[str, Any], save: Save) -> None:
    """Results: the copy bandwidth and the rate of products measured, and per case a row for each
    contender; a contender without a figure has a note instead.

    A case that fails is noted, and the next one taken; peers that a compiler makes come last, for
    it takes longer than all else.

    Raises:
        UnavailableError: no CUDA device; by then every contender has run once, small, on the CPU.
        AssertionError: a result of ours is wrong, or none came; it then has no figure.
    """
    if not torch.cuda.is_available():
        results["rehearsal"] = rehearse()
        save()
    gpu = device.require()
    torch.set_float32_matmul_precision("highest")
    results["copy_bytes_per_second"] = timing.copy_bandwidth(gpu)
    results["gemm_flop_per_second"] = timing.gemm_rate(gpu)
    results["cases"] = {}
    flush = timing.Flush(gpu)
    for name, take in _cases(gpu, results):
        rows: dict[str, dict[str, Any]] = results["cases"].setdefault(name, {})
        try:
            take(rows, flush)
        except Exception as error:
            rows[CASE] = {"note": f"{type(error).__name__}: {error}"}
        save()
        gc.collect()
        torch.cuda.empty_cache()
    wrong = [
        f"{name}: {_why(rows)}"
        for name, rows in results["cases"].items()
        if "ms" not in rows.get(OURS, {})
    ]
    assert not wrong, "; ".join(wrong)


def rehearse() -> dict[str, str]:
    """Every contender once on the CPU at a small shape: its relative error, or why it cannot run.

    The yardsticks are kernels of the GPU alone.
    """
    said = {}
    shape = dataclasses.replace(attention.TRAIN[0], B=1, H=2, Tq=16, Tm=16, D=16)
    inputs = attention.inputs_on(shape, torch.device("cpu"), requires_grad=True)
    for name in (OURS, *PEERS, *YARDSTICKS):
        try:
            attend, _ = attention.bind(name, shape, inputs)
            with torch.no_grad():
                out = attend()
            said[name] = "it ran"
            if name not in YARDSTICKS:
                said[name] += f", relative error {_error(out, shape, inputs):.1e}"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return said | adaptive.rehearse()


Take = Callable[[dict[str, dict[str, Any]], timing.Flush], None]


def _cases(gpu: torch.device, results: Mapping[str, Any]) -> Iterable[tuple[str, Take]]:
    """Name and what fills its rows, in the order of importance: time may run out."""
    for direction in ("forward", "backward", "forward+backward"):
        # Backward alone compares with what has a backward pass of its own.
        peers = () if direction == "backward" else PEERS_AT_ONCE
        for shape in attention.TRAIN:
            take = _attention(shape, direction, gpu, (OURS, *peers, *YARDSTICKS))
            yield f"{shape.name}/{direction}", take
    yield "decode/forward", _decode(gpu, results)
    for name in adaptive.OPS:
        yield f"{name}/forward+backward", adaptive.case(name, gpu)
    for direction in ("forward", "forward+backward"):
        for shape in attention.TRAIN:
            take = _attention(shape, direction, gpu, (OURS, *COMPILED_PEERS))
            yield f"{shape.name}/{direction}", take
    for shape in adaptive.OTHERS:
        for name in adaptive.OPS:
            yield f"{name}/{shape.name}/forward+backward", adaptive.case(name, gpu, shape)


def _attention(
    shape: AttentionShape, direction: str, gpu: torch.device, names: Iterable[str]
) -> Take:
    """Fills the rows of `names`; ours, timed again beside others, keeps its first figure."""

    def take(rows: dict[str, dict[str, Any]], flush: timing.Flush) -> None:
        first = rows.get(OURS)
        try:
            _fill(rows, _contenders(shape, direction, gpu, names, rows), flush)
        finally:
            if first is not None:
                rows[OURS] = first
        for name, row in rows.items():
            if "ms" in row:
                rate = attention.flop(name, shape, direction) / (row["ms"]["median"] * 1e-3)
                row["useful_tflops"] = rate / 1e12

    return take


def _decode(gpu: torch.device, results: Mapping[str, Any]) -> Take:
    def take(rows: dict[str, dict[str, Any]], flush: timing.Flush) -> None:
        shape = attention.DECODE
        names = (OURS, attention.EAGER, attention.SDPA_BIAS, attention.FLASH)
        _fill(rows, _contenders(shape, "forward", gpu, names, rows), flush)
        # Keys and values once, for the position scores r once per head; the rest is small.
        values = 2 * shape.B * shape.H * shape.n_keys * shape.D + shape.H * shape.n_rows * shape.D
        for row in rows.values():
            if "ms" in row:
                rate = 2 * values / (row["ms"]["median"] * 1e-3)
                row["of_copy_bandwidth"] = rate / results["copy_bytes_per_second"]

    return take


def _contenders(
    shape: AttentionShape,
    direction: str,
    gpu: torch.device,
    names: Iterable[str],
    rows: dict[str, dict[str, Any]],
) -> list[Contender]:
    """Those that run and are right; the others get a note. Each has several sets of inputs."""
    backward = direction != "forward"
    sets = [
        attention.inputs_on(shape, gpu, requires_grad=backward, seed=seed) for seed in range(SETS)
    ]
    found = []
    for name in names:
        try:
            bound = [attention.bind(name, shape, inputs) for inputs in sets]
            with torch.no_grad():
                out = bound[0][0]()
            if name not in YARDSTICKS:
                wrong = _error(out, shape, sets[0])
                assert wrong <= GATE, f"off by {wrong:.1e} of its norm, {GATE:.0e} is allowed"
            del out
            runs = [_run(attend, leaves, direction) for attend, leaves in bound]
            rows[name] = {"peak_mib": timing.peak_mib(runs[0])}
            found.append(Contender(name, runs))
        except Exception as error:
            rows[name] = {"note": f"{type(error).__name__}: {error}"}
            torch.cuda.empty_cache()
    return found


def _run(attend: attention.Attend, leaves: list[Tensor], direction: str) -> timing.Run:
    if direction == "forward":
        return torch.no_grad()(attend)
    with torch.no_grad():
        out = attend()
    dout = torch.randn_like(out)
    if direction == "forward+backward":
        return lambda: torch.autograd.grad(attend(), leaves, dout)
    out = attend()
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _fill(
    rows: dict[str, dict[str, Any]], contenders: list[Contender], flush: timing.Flush
) -> None:
    taken = timing.take(contenders, flush)
    for name, found in taken.items():
        rows[name]["ms"] = dataclasses.asdict(found)
    if OURS in taken:
        for name, ratio in timing.ratios(taken, OURS).items():
            rows[name]["over_ours"] = ratio


def _why(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What is known of why ours has no figure."""
    notes = (rows.get(name, {}).get("note") for name in (OURS, CASE))
    return next(filter(None, notes), "it was not timed")


def _error(out: Tensor, shape: AttentionShape, inputs: AttentionInputs) -> float:
    """Relative error of the norm against float64, on the first batch row's first head."""
    first = {
        name: None if x is None else (x[:1] if x.dim() == 2 else x[:1, :1]).detach().double()
        for name, x in inputs._asdict().items()
    }
    right = rel_attention(**first, causal=shape.causal, scale=shape.D**-0.5, backend="reference")
    return float((out[:1, :1].double() - right).norm() / right.norm())
