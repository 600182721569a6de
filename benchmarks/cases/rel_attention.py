"""`rel_attention` on a named shape: forward, backward and both, beside four other ways."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError
from benchmarks.inputs import AttentionInputs, AttentionShape, random_inputs
from benchmarks.measure import Timed, stopwatch
from benchmarks.peers import eager, sdpa
from txl_kernels import rel_attention

Pass = Literal["forward", "backward", "forward+backward"]
Attend = Callable[[AttentionInputs], Tensor]

REFERENCE = "reference"
EAGER, COMPILED, SDPA_BIAS, SDPA_PLAIN = "eager", "compiled", "sdpa+bias", "sdpa"

# Per attended pair and dimension of a head. Forward: q·k, q·r and P·v are products of 2 each.
# Backward: both score products again, dP, dv, dk, dr, and dq's two.
USEFUL_FLOP: dict[Pass, int] = {"forward": 6, "backward": 16, "forward+backward": 22}

# Relative error against float64, by Frobenius norm, above which a result is another one.
GATE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """A call of `rel_attention`; "backward" is timed for ours alone, as its rate."""

    shape: AttentionShape
    dtype: torch.dtype
    direction: Pass

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"rel_attention/{self.shape.name}/{dtype}/{self.direction}"

    @property
    def peers(self) -> tuple[str, ...]:
        return () if self.direction == "backward" else (EAGER, COMPILED, SDPA_BIAS)

    @property
    def yardsticks(self) -> tuple[str, ...]:
        return () if self.direction == "backward" else (SDPA_PLAIN,)

    @property
    def in_process(self) -> tuple[str, ...]:
        return () if self.direction == "backward" else (OURS, EAGER, SDPA_BIAS, SDPA_PLAIN)

    @property
    def flop(self) -> int:
        return USEFUL_FLOP[self.direction] * self.shape.D * self.shape.attended_pairs

    @property
    def tokens(self) -> None:
        return None

    def tiny(self) -> AttentionCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        attend, leaves = self._bound(name)
        dout = self._dout()
        if self.direction == "forward":
            yield stopwatch(torch.no_grad()(attend))
        elif self.direction == "backward":
            out = attend()
            yield stopwatch(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
        else:
            yield stopwatch(lambda: torch.autograd.grad(attend(), leaves, dout))

    def check(self, name: str) -> None:
        if name in self.yardsticks:
            return
        labels, expected = _reference_results(self.shape, self.dtype, self.direction)
        for label, right, got in zip(labels, expected, self._results(name), strict=True):
            error = float((got.double() - right).norm() / right.norm())
            if not error <= GATE[self.dtype]:  # NaN is an error too
                raise WrongResultError(
                    f"{self.name}: {label} of {name} is off by {error:.1e} of its norm; "
                    f"{GATE[self.dtype]:.0e} is allowed"
                )

    def _results(self, name: str) -> list[Tensor]:
        attend, leaves = self._bound(name)
        if self.direction == "forward":
            with torch.no_grad():
                return [attend()]
        out = attend()
        return [out.detach(), *torch.autograd.grad(out, leaves, self._dout())]

    def _bound(self, name: str) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        """A contender with its inputs, and those of them that get gradients."""
        inputs = random_inputs(self.shape, self.dtype, requires_grad=self.direction != "forward")
        if name == SDPA_PLAIN:
            joined = eager.with_memory(inputs)
            leaves = [x.detach().requires_grad_(x.requires_grad) for x in (inputs.q, *joined)]
            return functools.partial(sdpa.plain, *leaves), tuple(leaves)
        return functools.partial(_attend(name, self.shape), inputs), inputs.leaves()

    def _dout(self) -> Tensor:
        shape = self.shape
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(shape.B, shape.H, shape.Tq, shape.D, generator=generator)
        return dout.to(self.dtype)


def _attend(name: str, shape: AttentionShape) -> Attend:
    """The implementation `name` with everything bound that is no input of the case."""
    key_lens = None if shape.key_lens is None else torch.tensor(shape.key_lens)
    if name in (OURS, REFERENCE):
        backend = "auto" if name == OURS else "reference"
        return functools.partial(
            _rel_attention, causal=shape.causal, key_lens=key_lens, backend=backend
        )
    hidden = eager.hidden_keys(shape.Tq, shape.n_keys, key_lens, shape.causal)
    if name == SDPA_BIAS:
        return functools.partial(sdpa.with_position_bias, hidden=hidden)
    if name == EAGER:
        return functools.partial(eager.rel_attention, hidden=hidden)
    if name != COMPILED:
        raise ValueError(f"no contender {name!r}")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise PeerUnavailableError("torch.compile needs a C++ compiler, and none is here")
    torch.compiler.reset()  # each shape its own code: recompiling is limited, then silently eager
    return functools.partial(torch.compile(eager.rel_attention, dynamic=False), hidden=hidden)


def _rel_attention(inputs: AttentionInputs, **options: Any) -> Tensor:
    out: Tensor = rel_attention(**inputs._asdict(), **options)
    return out


@functools.lru_cache(maxsize=1)
def _reference_results(
    shape: AttentionShape, dtype: torch.dtype, direction: Pass
) -> tuple[list[str], list[Tensor]]:
    """Labels and float64 results of the specification, on the inputs as `dtype` rounds them."""
    inputs = random_inputs(shape, dtype, requires_grad=direction != "forward")
    precise = inputs.convert(torch.float64)
    out = _attend(REFERENCE, shape)(precise)
    if direction == "forward":
        return ["out"], [out]
    dout = AttentionCase(shape, dtype, direction)._dout().double()
    names = [name for name, tensor in inputs._asdict().items() if tensor is not None]
    grads = torch.autograd.grad(out, precise.leaves(), dout)
    return ["out", *(f"d{name}" for name in names)], [out.detach(), *grads]
