"""Checks every op on this machine: results against float64, times against plain torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from txl_kernels.backends import BACKENDS, resolve, triton
from txl_kernels.backends.reference import adaptive_softmax as softmax
from txl_kernels.ops.adaptive_sample import adaptive_sample
from txl_kernels.testing import comparison
from txl_kernels.testing.budget import error_over_budget
from txl_kernels.testing.problems import SOFTMAX, Problem, problems, softmax_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DRAWS = 8  # of each row
_BINS = 16  # of each cluster
_MAX_DEVIATION = 6.0  # of a bin's count, in standard deviations


class OpCheck(NamedTuple):
    """One op on one backend, in one dtype and direction.

    Attributes:
        op, backend, device, dtype: the call that was checked.
        direction: "forward"; "backward" compares gradients and times both passes.
        error: the largest error as a share of the error budget, at most 1 in a correct result; NaN
            if there is no result.
        seconds, peer_seconds: median times of one call; None if the call failed.
        peer: name of the computation that `peer_seconds` was measured with.
        failure: the reason in one sentence if the check failed, else None.
    """

    op: str
    backend: str
    device: str
    dtype: torch.dtype
    direction: str
    error: float
    seconds: float | None
    peer_seconds: float | None
    peer: str
    failure: str | None


def check_ops(
    device: str, dtypes: Sequence[torch.dtype] = DTYPES, *, min_seconds: float = 0.1
) -> Iterator[OpCheck]:
    """Yields one check per op, backend, dtype and direction.

    All kernels that run on the device are checked; where an op has none, the reference is.

    Args:
        device: "cpu" or "cuda".
        dtypes: dtypes of the inputs.
        min_seconds: time of one measurement; a check has two.
    """
    for problem in problems():
        for dtype in dtypes:
            for backend in _backends(problem, device, dtype):
                yield from _check(problem, backend, device, dtype, min_seconds)
    for dtype in dtypes:
        yield _check_sampling(device, dtype, min_seconds)


def _backends(problem: Problem, device: str, dtype: torch.dtype) -> list[str]:
    kernels = [
        name
        for name in BACKENDS
        if name != "reference"
        and not (name == "triton" and triton.interprets())  # minutes for one call
        and resolve(
            problem.op,
            backend=name,
            device=device,
            dtype=dtype,
            Tq=problem.Tq,
            needs_grad=problem.has_gradients,
        ).backend
    ]
    return kernels or ["reference"]


def _check(
    problem: Problem, backend: str, device: str, dtype: torch.dtype, min_seconds: float
) -> Iterator[OpCheck]:
    op, arguments = problem.op, problem.arguments(dtype, device)
    with torch.no_grad():
        dout = comparison.random_like(_first(comparison.reference(op, arguments)))
    ours = functools.partial(comparison.call, op, backend)
    for direction in ("forward", "backward") if problem.has_gradients else ("forward",):
        gradient = dout if direction == "backward" else None
        sides = [
            functools.partial(comparison.results, op, arguments, run, gradient)
            for run in (ours, problem.peer)
        ]
        with torch.set_grad_enabled(gradient is not None):
            row = _row(
                (problem.name or op, backend, device, dtype, direction),
                functools.partial(_largest_error, op, arguments, ours, gradient),
                sides,
                problem.peer_name,
                min_seconds,
            )
        yield row


def _first(outputs: Any) -> Tensor:
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return found


def _largest_error(
    op: str, arguments: list[Any], run: comparison.Run, dout: Tensor | None
) -> tuple[float, str]:
    """The largest share of the budget among all results, and the name of that result."""
    actual = comparison.results(op, arguments, run, dout)
    shares = {
        name: error_over_budget(name, *tensors, **options)
        for name, tensors, options in comparison.compared(op, arguments, actual, dout)
        if dout is None or name not in ("out", "lse")
    }
    worst = max(shares, key=lambda name: shares[name])
    return shares[worst], worst


def _row(
    call: tuple[str, str, str, torch.dtype, str],
    error: Callable[[], tuple[float, str]],
    sides: Sequence[Callable[[], Any]],
    peer: str,
    min_seconds: float,
) -> OpCheck:
    """The check of a call: its error and the times of ours and of the peer.

    Args:
        call: the first five members of `OpCheck`.
        error: returns the error and the name of the result that has it.
        sides: one call of ours, and one of the peer.
        peer, min_seconds: the peer's name; time of one measurement.
    """
    share, seconds = math.nan, None
    try:
        share, name = error()
        failure = None if share <= 1 else f"the error of {name} is {share:.3g} times the budget"
        seconds = _median_seconds(sides[0], min_seconds)
    except Exception as problem:  # any error of a kernel fails its row and no other
        first_line = str(problem).strip().partition("\n")[0]
        failure = f"{type(problem).__name__}: {first_line}"
    return OpCheck(*call, share, seconds, _peer_seconds(sides[1], min_seconds), peer, failure)


def _peer_seconds(peer: Callable[[], Any], min_seconds: float) -> float | None:
    try:
        return _median_seconds(peer, min_seconds)
    except RuntimeError:  # torch does not compute every op in every dtype on every device
        return None


def _median_seconds(run: Callable[[], Any], min_seconds: float) -> float:
    # Its import loads torch's compiler of extensions, which warns where nvcc is but no GPU.
    from torch.utils.benchmark import Timer

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=min_seconds).median)


def _check_sampling(device: str, dtype: torch.dtype, min_seconds: float) -> OpCheck:
    """Compares the frequencies of drawn tokens with their probabilities in float64."""
    hidden, _, (projection, weight, bias), tails = softmax_inputs(dtype, device)
    cutoffs, head = SOFTMAX.cutoffs, softmax.Cluster(projection, weight, bias)
    clusters = [softmax.Cluster(*tail) for tail in tails]

    def draw(hidden: Tensor) -> Tensor:
        generator = torch.Generator(device).manual_seed(7)
        options: dict[str, Any] = {"head_bias": bias, "head_proj": projection}
        return adaptive_sample(
            hidden, weight, tails, cutoffs=cutoffs, generator=generator, **options
        )

    def probabilities(dtype: torch.dtype) -> Tensor:
        return softmax.log_prob(hidden, head, clusters, compute_dtype=dtype).exp()

    def error() -> tuple[float, str]:
        token = torch.arange(SOFTMAX.V, device=device)
        cluster = torch.bucketize(token, torch.tensor(cutoffs, device=device), right=True)
        bins = cluster * _BINS + token % _BINS
        n_bins = (len(cutoffs) + 1) * _BINS
        p = probabilities(torch.float64)  # [N, V]
        p = torch.zeros(len(p), n_bins, dtype=p.dtype, device=device).index_add(1, bins, p)
        counts = bins[draw(hidden.repeat(_DRAWS, 1))].bincount(minlength=n_bins)
        deviation = (_DRAWS * p * (1 - p)).sum(0).sqrt()
        largest = ((counts - _DRAWS * p.sum(0)) / deviation).abs().max()
        return float(largest) / _MAX_DEVIATION, "the frequencies"

    with torch.no_grad():
        assert bias is not None
        bias[-len(cutoffs) :] += 6.0  # each cluster is drawn about as often as the shortlist
        return _row(
            ("adaptive_sample", "reference", device, dtype, "forward"),
            error,
            [lambda: draw(hidden), lambda: torch.multinomial(probabilities(dtype), 1)],
            "torch.multinomial of all probabilities",
            min_seconds,
        )
