"""Checks every op on this machine: results against float64, times against plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from txl_kernels.backends import BACKENDS, resolve, triton
from txl_kernels.ops.adaptive_sample import adaptive_sample
from txl_kernels.testing.budget import error_over_budget
from txl_kernels.testing.problems import (
    CUTOFFS,
    SOFTMAX_PEER,
    Leaves,
    Problem,
    V,
    problems,
    softmax_arguments,
    softmax_leaves,
    torch_softmax,
)

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


class _Call(NamedTuple):
    op: str
    backend: str
    device: str
    dtype: torch.dtype
    direction: str


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
    leaves = {name: leaf.detach() for name, leaf in problem.leaves(dtype, device).items()}

    def ours(x: Leaves) -> Tensor:
        return problem.call(x, backend)

    def ref64(x: Leaves) -> Tensor:
        return problem.call({name: leaf.double() for name, leaf in x.items()}, "reference")

    peer = problem.peer or problem.eager
    with torch.no_grad():
        yield _row(
            _Call(problem.name or problem.op, backend, device, dtype, "forward"),
            lambda: _output_error([call(leaves) for call in (ours, ref64, problem.eager)], dtype),
            [lambda: ours(leaves), lambda: peer(leaves)],
            problem.peer_name,
            min_seconds,
        )
    if problem.has_gradients:
        yield _row(
            _Call(problem.name or problem.op, backend, device, dtype, "backward"),
            lambda: _gradient_error(problem, ours, ref64, leaves, dtype),
            [lambda: _gradients(ours, leaves), lambda: _gradients(peer, leaves)],
            problem.peer_name,
            min_seconds,
        )


def _row(
    call: _Call,
    error: Callable[[], tuple[float, str]],
    sides: Sequence[Callable[[], Any]],
    peer: str,
    min_seconds: float,
) -> OpCheck:
    """The check of a call: its error and the times of ours and of the peer."""
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
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=min_seconds).median)


def _output_error(outputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[float, str]:
    return error_over_budget("output", *outputs, dtype=dtype), "the output"


def _gradient_error(
    problem: Problem,
    ours: Callable[[Leaves], Tensor],
    ref64: Callable[[Leaves], Tensor],
    leaves: Leaves,
    dtype: torch.dtype,
) -> tuple[float, str]:
    """The largest share of the budget among all gradients, and the name of that gradient."""
    results = [_gradients(call, leaves) for call in (ours, ref64, problem.eager)]
    magnitudes = problem.magnitudes(leaves, results[0][1]) if problem.magnitudes else {}
    shares = {}
    for name, *gradients in zip(leaves, *(found for found, _ in results), strict=True):
        root_mean_square = float(gradients[1].square().mean().sqrt())
        shares[name] = error_over_budget(
            f"gradient of {name}",
            *gradients,
            dtype=dtype,
            magnitude=magnitudes.get(name, root_mean_square),
            is_sum=name in problem.sums or name not in magnitudes,
        )
    worst = max(shares, key=lambda name: shares[name])
    return shares[worst], f"the gradient of {worst}"


def _gradients(call: Callable[[Leaves], Tensor], x: Leaves) -> tuple[Sequence[Tensor], Tensor]:
    """The gradients of all leaves, and the gradient of the output that they belong to."""
    with torch.enable_grad():
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in x.items()}
        out = call(leaves)
        generator = torch.Generator().manual_seed(5)
        dout = torch.randn(out.shape, generator=generator, device="cpu").to(out)
        return torch.autograd.grad(out, list(leaves.values()), dout), dout


def _check_sampling(device: str, dtype: torch.dtype, min_seconds: float) -> OpCheck:
    """Compares the frequencies of drawn tokens with their probabilities in float64."""
    x = softmax_leaves(dtype, device)
    x["head.bias"][-len(CUTOFFS) :] += 6.0  # each cluster is drawn about as often as the shortlist
    log_prob = torch_softmax("log_prob")

    def draw(hidden: Tensor) -> Tensor:
        generator = torch.Generator(device).manual_seed(7)
        return adaptive_sample(**softmax_arguments(x | {"hidden": hidden}), generator=generator)

    def error() -> tuple[float, str]:
        token = torch.arange(V, device=device)
        cluster = torch.bucketize(token, torch.tensor(CUTOFFS, device=device), right=True)
        bins = cluster * _BINS + token % _BINS
        n_bins = (len(CUTOFFS) + 1) * _BINS
        p = log_prob({name: leaf.double() for name, leaf in x.items()}).exp()  # [N, V]
        p = torch.zeros(len(p), n_bins, dtype=p.dtype, device=device).index_add(1, bins, p)
        counts = bins[draw(x["hidden"].repeat(_DRAWS, 1))].bincount(minlength=n_bins)
        deviation = (_DRAWS * p * (1 - p)).sum(0).sqrt()
        largest = ((counts - _DRAWS * p.sum(0)) / deviation).abs().max()
        return float(largest) / _MAX_DEVIATION, "the frequencies"

    with torch.no_grad():
        return _row(
            _Call("adaptive_sample", "reference", device, dtype, "forward"),
            error,
            [lambda: draw(x["hidden"]), lambda: torch.multinomial(log_prob(x).exp(), 1)],
            f"torch.multinomial after {SOFTMAX_PEER}",
            min_seconds,
        )
