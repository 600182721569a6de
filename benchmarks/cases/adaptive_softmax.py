"""The adaptive softmax of a published model: loss and gradients, beside the modules that people
run and the whole softmax."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.cases import OURS, WrongResultError
from benchmarks.device import INPUT_SETS, preferred_backend, timer
from benchmarks.measure import Timed
from benchmarks.peers import adaptive_softmax as peers
from benchmarks.peers.hf_softmax import SoftmaxWorker
from benchmarks.softmax_inputs import SoftmaxInputs, SoftmaxShape, random_softmax
from txl_kernels import adaptive_loss, adaptive_nll

Work = Literal["loss", "nll"]

TORCH, HF, TORCH_F32, HF_F32 = "torch", "hf", "torch-float32", "hf-float32"
REFERENCE, FULL, CHUNKED = "reference", "full", "full-chunked"

# Relative error against float64, by Frobenius norm, above which a result is another one.
GATE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class SoftmaxCase:
    """Forward and backward of the mean loss ("loss": `adaptive_loss`), or of each token's loss
    with an arbitrary gradient each ("nll": `adaptive_nll`).

    Peers compute in the case's dtype; in bfloat16 also in float32, as they are run.
    """

    shape: SoftmaxShape
    dtype: torch.dtype
    work: Work
    device: str = "cpu"

    bytes_read: ClassVar[None] = None

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"adaptive_softmax/{self.shape.name}/{dtype}/{self.work}"

    @property
    def peers(self) -> tuple[str, ...]:
        if self.device != "cpu":
            return (TORCH,)
        return (TORCH, HF) if self.dtype == torch.float32 else (TORCH, HF, TORCH_F32, HF_F32)

    @property
    def yardsticks(self) -> tuple[str, ...]:
        """Ten times as slow, so only once: the whole softmax, where the model has one table for
        it, and the specification, which puts every token through every cluster."""
        if self.device != "cpu":
            return CHUNKED, FULL
        once = self.shape.div_val == 1 and self.dtype == torch.float32 and self.work == "loss"
        return (CHUNKED, FULL, REFERENCE) if once else ()

    @property
    def in_process(self) -> tuple[str, ...]:
        return (OURS, TORCH, *self.yardsticks)

    @property
    def flop(self) -> int:
        return self.shape.flop

    def flop_of(self, name: str) -> int:
        """Useful operations of a contender: the whole softmax multiplies with all V rows."""
        shape = self.shape
        return 6 * shape.N * shape.V * shape.d if name in (CHUNKED, FULL) else shape.flop

    @property
    def tokens(self) -> int:
        return self.shape.N

    def tiny(self) -> SoftmaxCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        if name in (HF, HF_F32):
            with self._worker(name) as worker:
                yield lambda: worker.ask("run", per_token=self.work == "nll")["seconds"]
        elif name in (FULL, CHUNKED):
            yield timer([self._whole_softmax(name)], torch.device(self.device))
        else:
            n_sets = 1 if self.device == "cpu" else INPUT_SETS
            runs = [self._run(name, self._inputs(name, 1 + n)) for n in range(n_sets)]
            yield timer(runs, torch.device(self.device))

    def _run(self, name: str, inputs: SoftmaxInputs) -> Callable[[], object]:
        loss, leaves, dout = self._loss(name, inputs), inputs.leaves().values(), self._dout()
        return lambda: torch.autograd.grad(loss(), list(leaves), dout)

    def result_bytes(self, name: str) -> int:
        """Of the loss and the gradients, which the caller asked for."""
        if name in (FULL, CHUNKED):
            leaves = self._whole_leaves()
        else:
            leaves = tuple(self._inputs(name).leaves().values())
        return sum(x.numel() * x.element_size() for x in leaves)

    def check(self, name: str) -> None:
        if name in (FULL, CHUNKED):
            return
        if name in (HF, HF_F32):
            with self._worker(name) as worker:
                got = worker.results()
        else:
            got = self._results(name)
        per_token = self.work == "nll" or name in (HF, HF_F32)
        expected = expected_results(self.shape, self.dtype, per_token, self.device)
        for label, right in expected.items():
            error = float((got[label].double() - right).norm() / right.norm())
            if not error <= GATE[self.dtype]:  # NaN is an error too
                raise WrongResultError(
                    f"{self.name}: {label} of {name} is off by {error:.1e} of its norm; "
                    f"{GATE[self.dtype]:.0e} is allowed"
                )

    def _results(self, name: str) -> dict[str, Tensor]:
        inputs = self._inputs(name)
        loss, leaves = self._loss(name, inputs)(), inputs.leaves()
        grads = torch.autograd.grad(loss, list(leaves.values()), self._dout())
        return {"nll": loss.detach(), **dict(zip(leaves, grads, strict=True))}

    def _loss(self, name: str, inputs: SoftmaxInputs) -> Callable[[], Tensor]:
        if name in (OURS, REFERENCE):
            op = adaptive_loss if self.work == "loss" else adaptive_nll
            backend = "reference"
            if name == OURS:
                options = {"dtype": self.dtype, "needs_grad": True}
                backend = preferred_backend(op.__name__, self.device, **options)
            return functools.partial(op, **arguments(self.shape, inputs), backend=backend)
        module = peers.torch_module(inputs)
        if self.work == "loss":
            return lambda: module(inputs.hidden, inputs.target).loss
        return lambda: -module(inputs.hidden, inputs.target).output

    def _inputs(self, name: str, seed: int = 1) -> SoftmaxInputs:
        if self.device != "cpu":
            return inputs_on_gpu(self.shape, self.dtype, seed)
        inputs = random_softmax(self.shape, self.dtype, seed)
        return inputs.convert(torch.float32) if name == TORCH_F32 else inputs

    def _dout(self) -> Tensor | None:
        return token_gradients(self.shape).to(self.device) if self.work == "nll" else None

    def _worker(self, name: str) -> SoftmaxWorker:
        inputs = random_softmax(self.shape, self.dtype)
        if name == HF_F32:
            inputs = inputs.convert(torch.float32)
        return SoftmaxWorker(inputs, self.shape.div_val, token_gradients(self.shape))

    def _whole_leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden states and one table of all V."""
        inputs = self._inputs(FULL)
        if self.shape.div_val > 1:
            table = torch.randn(self.shape.V, self.shape.d, device=self.device)
            table = (table * self.shape.d**-0.5).to(self.dtype)
        else:
            words = inputs.head_weight[: self.shape.sizes[0]]
            table = torch.cat([words, *inputs.tail_weights])
        return inputs.hidden, table.detach().requires_grad_()

    def _whole_softmax(self, name: str) -> Callable[[], object]:
        loss = peers.full_loss if name == FULL else peers.chunked_full_loss
        leaves, target = self._whole_leaves(), self.shape.targets().to(self.device)
        return lambda: torch.autograd.grad(loss(*leaves, target), leaves)


def arguments(shape: SoftmaxShape, inputs: SoftmaxInputs) -> dict[str, Any]:
    """A call of `adaptive_loss` or `adaptive_nll`."""
    projections = inputs.projections or [None] * len(inputs.tail_weights)
    return {
        "hidden": inputs.hidden,
        "target": inputs.target,
        "head_weight": inputs.head_weight,
        "head_bias": inputs.head_bias,
        "tails": [
            (projection, weight, None)
            for projection, weight in zip(projections, inputs.tail_weights, strict=True)
        ],
        "cutoffs": shape.cutoffs,
    }


@functools.lru_cache(maxsize=INPUT_SETS)
def inputs_on_gpu(shape: SoftmaxShape, dtype: torch.dtype, seed: int) -> SoftmaxInputs:
    """Kept, since they are drawn on the CPU, in half a second."""
    return random_softmax(shape, dtype, seed).convert(dtype, "cuda")


def token_gradients(shape: SoftmaxShape) -> Tensor:
    """An arbitrary gradient for each token's loss: float32 [N]."""
    return torch.randn(shape.N, generator=torch.Generator().manual_seed(2)) / shape.N


@functools.lru_cache(maxsize=2)
def expected_results(
    shape: SoftmaxShape, dtype: torch.dtype, per_token: bool, device: str = "cpu"
) -> dict[str, Tensor]:
    """Loss ("nll": [N], or the mean) and gradients by the formula in float64, each cluster for its
    own tokens, on the inputs as `dtype` rounds them."""
    inputs = random_softmax(shape, dtype).convert(torch.float64, device)
    target = inputs.target
    column = target.clamp(max=shape.cutoffs[0] - 1)
    nll = inputs.hidden.new_zeros(shape.N)
    for k, (first, end) in enumerate(itertools.pairwise(shape.ends[1:])):
        rows = ((target >= first) & (target < end)).nonzero()[:, 0]
        column[rows] = shape.cutoffs[0] + k
        x = inputs.hidden[rows]
        x = x @ inputs.projections[k].T if inputs.projections else x
        log_probs = (x @ inputs.tail_weights[k].T).log_softmax(1)
        picked = log_probs.gather(1, target[rows, None] - first)[:, 0]
        nll = nll.index_add(0, rows, -picked)
    logits = inputs.hidden @ inputs.head_weight.T + inputs.head_bias
    nll = nll - logits.log_softmax(1).gather(1, column[:, None])[:, 0]
    loss = nll if per_token else nll.mean()
    dout = token_gradients(shape).to(device).double() if per_token else None
    leaves = inputs.leaves()
    grads = torch.autograd.grad(loss, list(leaves.values()), dout)
    return {"nll": loss.detach(), **dict(zip(leaves, grads, strict=True))}
