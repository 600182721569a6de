"""The adaptive softmax that is timed on a GPU: WikiText-103's large model, and its peers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu import timing
from benchmarks.gpu.timing import Contender
from txl_kernels import adaptive_loss, adaptive_nll

OURS, MODULE, CHUNKED = "ours", "torch's module", "full softmax, in chunks"
OPS = ("adaptive_loss", "adaptive_nll")
CHUNK = 1024  # tokens whose logits over all V the chunked peer holds at a time


@dataclasses.dataclass(frozen=True)
class AdaptiveShape:
    """Sizes of a call: `N` tokens of width `d`; a tail's width is a `div_val`-th of the last."""

    N: int
    d: int
    V: int
    cutoffs: tuple[int, ...]
    div_val: int

    @property
    def borders(self) -> tuple[int, ...]:
        return (*self.cutoffs, self.V)

    @property
    def widths(self) -> list[int]:
        """Of the tails."""
        return [self.d // self.div_val ** (k + 1) for k in range(len(self.cutoffs))]


WT103_LARGE = AdaptiveShape(N=8192, d=1024, V=267_735, cutoffs=(20_000, 40_000, 200_000), div_val=4)


class AdaptiveInputs(NamedTuple):
    """Leaves of a call, and its targets."""

    hidden: Tensor  # [N, d]
    target: Tensor  # [N]
    head: Tensor  # [c0 + n_tails, d]
    tails: tuple[tuple[Tensor, Tensor, None], ...]

    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.head, *(x for tail in self.tails for x in tail[:2])]


def inputs_on(
    shape: AdaptiveShape,
    device: torch.device,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> AdaptiveInputs:
    """Normal values, and targets by Zipf's law: the likelihood of token n goes with 1 / (n + 1)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device) * std
        return values.to(dtype).requires_grad_()

    weights = 1.0 / torch.arange(1, shape.V + 1, device=device, dtype=torch.float64)
    target = torch.multinomial(weights, shape.N, replacement=True, generator=generator)
    sizes = [end - begin for begin, end in zip(shape.cutoffs, shape.borders[1:], strict=True)]
    return AdaptiveInputs(
        hidden=normal(shape.N, shape.d, std=1.0),
        target=target,
        head=normal(shape.cutoffs[0] + len(sizes), shape.d, std=0.02),
        tails=tuple(
            (normal(width, shape.d, std=0.03), normal(size, width, std=0.1), None)
            for width, size in zip(shape.widths, sizes, strict=True)
        ),
    )


def three_products_flop(shape: AdaptiveShape, target: Tensor) -> int:
    """FLOP of the logits' product and its two gradients, over the tokens of each cluster."""
    total = shape.N * shape.d * (shape.cutoffs[0] + len(shape.cutoffs))
    for k, (begin, end) in enumerate(zip(shape.cutoffs, shape.borders[1:], strict=True)):
        n = int(((target >= begin) & (target < end)).sum())
        total += n * shape.widths[k] * (end - begin + shape.d)
    return 6 * total


def bind(name: str, op: str, shape: AdaptiveShape, inputs: AdaptiveInputs) -> Callable[[], Any]:
    """Forward and backward as a call without arguments; returns the loss's sum."""
    loss, leaves = _forward(name, op, shape, inputs)

    def both() -> Tensor:
        value = loss()
        torch.autograd.grad(value, leaves)
        return value.detach()

    return both


def case(op: str, gpu: torch.device) -> Callable[[dict[str, dict[str, Any]], timing.Flush], None]:
    """What fills the rows of `op` at `WT103_LARGE`."""

    def take(rows: dict[str, dict[str, Any]], flush: timing.Flush) -> None:
        shape = WT103_LARGE
        sets = [inputs_on(shape, gpu, seed=seed) for seed in range(2)]
        right = float(_reference(shape, sets[0]))
        contenders = []
        for name in (OURS, MODULE, CHUNKED):
            try:
                runs = [bind(name, op, shape, inputs) for inputs in sets]
                value = float(runs[0]())
                if name == OURS:
                    assert abs(value - right) <= 1e-2 * right, f"loss {value:.6g}, due {right:.6g}"
                rows[name] = {"peak_mib": timing.peak_mib(runs[0])}
                contenders.append(Contender(name, runs))
            except Exception as error:
                rows[name] = {"note": f"{type(error).__name__}: {error}"}
        flop = three_products_flop(shape, sets[0].target)
        for name, found in timing.take(contenders, flush).items():
            rows[name]["ms"] = dataclasses.asdict(found)
            rows[name]["useful_tflops"] = flop / (found.median * 1e-3) / 1e12

    return take


def rehearse() -> dict[str, str]:
    """Each contender once on the CPU, small."""
    shape = AdaptiveShape(N=32, d=64, V=100, cutoffs=(20, 40), div_val=4)
    inputs = inputs_on(shape, torch.device("cpu"))
    said = {}
    for name in (OURS, MODULE, CHUNKED):
        for op in OPS:
            try:
                said[f"{op}/{name}"] = f"loss {float(bind(name, op, shape, inputs)()):.4g}"
            except Exception as error:
                said[f"{op}/{name}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return said


def _forward(
    name: str, op: str, shape: AdaptiveShape, inputs: AdaptiveInputs
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The loss's sum over tokens, and what gets gradients."""
    if name == OURS:
        call = (inputs.hidden, inputs.target, inputs.head, inputs.tails)
        if op == "adaptive_loss":
            loss = functools.partial(adaptive_loss, *call, cutoffs=shape.cutoffs, reduction="sum")
            return loss, inputs.leaves()
        return lambda: adaptive_nll(*call, cutoffs=shape.cutoffs).sum(), inputs.leaves()
    if name == MODULE:
        module = torch.nn.AdaptiveLogSoftmaxWithLoss(
            shape.d, shape.V, list(shape.cutoffs), div_value=shape.div_val,
            device=inputs.hidden.device, dtype=inputs.hidden.dtype,
        )  # fmt: skip
        hidden, target = inputs.hidden, inputs.target
        leaves = [hidden, *module.parameters()]
        return lambda: -module(hidden, target).output.float().sum(), leaves
    weight = torch.randn(shape.V, shape.d, device=inputs.hidden.device) * 0.02
    full = weight.to(inputs.hidden.dtype).requires_grad_()
    return functools.partial(_chunked, inputs.hidden, inputs.target, full), [inputs.hidden, full]


def _chunked(hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Full softmax cross entropy, some tokens at a time, their logits made again in backward."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for x, y in zip(hidden.split(CHUNK), target.split(CHUNK), strict=True):
        part = checkpoint(_cross_entropy, x, y, weight, use_reentrant=False)
        total = total + part
    return total


def _cross_entropy(hidden: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), target, reduction="sum")


@torch.no_grad()
def _reference(shape: AdaptiveShape, inputs: AdaptiveInputs) -> Tensor:
    """The loss's sum by the specification, in float32."""
    tails = [(p.float(), w.float(), None) for p, w, _ in inputs.tails]
    return adaptive_loss(
        inputs.hidden.float(), inputs.target, inputs.head.float(), tails,
        cutoffs=shape.cutoffs, reduction="sum", backend="reference",
    )  # fmt: skip
