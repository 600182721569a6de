"""The adaptive softmaxes that are timed on a GPU: WikiText-103's and lm1b's, and their peers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.cases.adaptive_softmax import arguments
from benchmarks.gpu import timing
from benchmarks.gpu.timing import Contender
from benchmarks.peers.adaptive_softmax import full_loss, torch_module
from benchmarks.softmax_inputs import SoftmaxInputs, SoftmaxShape, random_softmax
from txl_kernels import adaptive_loss, adaptive_nll

OURS, MODULE = "ours", "torch's module"
FULL, CHUNKED = "full softmax", "full softmax, in chunks"
CONTENDERS = (OURS, MODULE, CHUNKED, FULL)
OPS = ("adaptive_loss", "adaptive_nll")
SETS = 2  # of inputs, in turn
CHUNK = 1024  # tokens whose logits over all V the chunked peer holds at a time
GATE = 1e-2  # relative error of the loss's sum above which it is another

# As the packaged presets have them, which take a YAML reader that a GPU machine need not have.
_WT103 = {"V": 267_735, "cutoffs": (20_000, 40_000, 200_000)}
WT103_LARGE = SoftmaxShape(name="wt103_large", N=8192, d=1024, div_val=4, **_WT103)
OTHERS = (
    SoftmaxShape(name="wt103_base", N=9000, d=410, div_val=1, **_WT103),
    SoftmaxShape(
        name="lm1b_large", N=9000, d=1280, V=793_470, cutoffs=(60_000, 100_000, 640_000), div_val=4
    ),
)


def inputs_on(
    shape: SoftmaxShape, device: torch.device, dtype: torch.dtype, *, turn: int = 0
) -> SoftmaxInputs:
    """Normal values and targets as words fall in text; another `turn` rolls them."""
    inputs = random_softmax(shape, dtype)

    def moved(x: Tensor) -> Tensor:
        return x.detach().flatten().roll(turn).view(x.shape).to(device).requires_grad_()

    hidden, target, weight, bias, *lists = inputs
    lists = [[moved(x) for x in part] for part in lists]
    return SoftmaxInputs(
        moved(hidden), target.flip(0).to(device) if turn else target.to(device),
        moved(weight), moved(bias), *lists,
    )  # fmt: skip


def bind(name: str, op: str, shape: SoftmaxShape, inputs: SoftmaxInputs) -> Callable[[], Tensor]:
    """Forward and backward as a call without arguments; returns the loss's sum over tokens, the
    full softmax's own loss where it is that."""
    if name in (CHUNKED, FULL):
        table = torch.randn(shape.V, shape.d, device=inputs.hidden.device) * shape.d**-0.5
        full = table.to(inputs.hidden.dtype).requires_grad_()
        leaves = [inputs.hidden, full]
        whole = _chunked if name == CHUNKED else full_loss
        loss = functools.partial(whole, inputs.hidden, full, inputs.target)
    else:
        leaves = list(inputs.leaves().values())
        loss = _module(inputs) if name == MODULE else ours(op, shape, inputs)

    def both() -> Tensor:
        value = loss()
        torch.autograd.grad(value, leaves)
        return value.detach()

    return both


def case(
    op: str, gpu: torch.device, shape: SoftmaxShape = WT103_LARGE
) -> Callable[[dict[str, dict[str, Any]], timing.Flush], None]:
    """What fills the rows of `op` at a shape."""

    def take(rows: dict[str, dict[str, Any]], flush: timing.Flush) -> None:
        sets = [inputs_on(shape, gpu, torch.bfloat16, turn=turn) for turn in range(SETS)]
        right = reference(shape, sets[0])
        contenders = []
        for name in CONTENDERS:
            try:
                runs = [bind(name, op, shape, inputs) for inputs in sets]
                wrong = abs(float(runs[0]()) - right) / right
                # The full softmax is of other weights.
                assert name in (CHUNKED, FULL) or wrong <= GATE, f"its loss is off by {wrong:.1e}"
                rows[name] = {"peak_mib": timing.peak_mib(runs[0])}
                contenders.append(Contender(name, runs))
            except Exception as error:
                rows[name] = {"note": f"{type(error).__name__}: {error}"}
        for name, found in timing.take(contenders, flush).items():
            rows[name]["ms"] = dataclasses.asdict(found)
            rows[name]["useful_tflops"] = shape.flop / (found.median * 1e-3) / 1e12

    return take


def rehearse() -> dict[str, str]:
    """Each contender once on the CPU, small."""
    said = {}
    for shape in (WT103_LARGE, *OTHERS):
        small = shape.tiny()
        inputs = inputs_on(small, torch.device("cpu"), torch.bfloat16)
        for op, name in itertools.product(OPS, CONTENDERS):
            try:
                found = f"it ran, loss {float(bind(name, op, small, inputs)()):.4g}"
            except Exception as error:
                found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            said[f"{op}/{shape.name}/{name}"] = found
    return said


@torch.no_grad()
def reference(shape: SoftmaxShape, inputs: SoftmaxInputs) -> float:
    """The loss's sum by the specification, in float32."""
    precise = inputs.convert(torch.float32)
    return float(ours("adaptive_loss", shape, precise, backend="reference")())


def ours(
    op: str, shape: SoftmaxShape, inputs: SoftmaxInputs, backend: str = "auto"
) -> Callable[[], Tensor]:
    call = functools.partial(
        adaptive_loss if op == "adaptive_loss" else adaptive_nll,
        **arguments(shape, inputs),
        backend=backend,
    )
    if op == "adaptive_loss":
        return functools.partial(call, reduction="sum")
    return lambda: call().sum()


def _module(inputs: SoftmaxInputs) -> Callable[[], Tensor]:
    """torch's module on the same weights."""
    module = torch_module(inputs)
    return lambda: -module(inputs.hidden, inputs.target).output.float().sum()


def _chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Full softmax cross entropy, some tokens at a time, their logits made again in backward."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for x, y in zip(hidden.split(CHUNK), target.split(CHUNK), strict=True):
        total = total + checkpoint(_cross_entropy, x, y, weight, use_reentrant=False)
    return total


def _cross_entropy(hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), target, reduction="sum")
