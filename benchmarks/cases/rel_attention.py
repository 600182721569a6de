"""`rel_attention` on a named shape: forward, backward and both, with other implementations."""

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
from benchmarks.device import INPUT_SETS, preferred_backend, timer
from benchmarks.inputs import AttentionInputs, AttentionShape, random_inputs
from benchmarks.measure import Timed
from benchmarks.peers import eager, flex, inkling, sdpa
from txl_kernels import rel_attention

Pass = Literal["forward", "backward", "forward+backward"]
Attend = Callable[[AttentionInputs], Tensor]

REFERENCE = "reference"
EAGER, COMPILED, SDPA_BIAS, SDPA_PLAIN = "eager", "compiled", "sdpa+bias", "sdpa"
FLEX, FLASH, CUDNN = "flex", "flash", "cudnn"
# The classes of Hugging Face; the same computation in plain PyTorch; SDPA without positions.
HF_SDPA, HF_RESTATED, SDPA_CAUSAL = "hf-sdpa", "hf-restated", "sdpa-causal"
COMPILED_PEERS = (COMPILED, FLEX)  # their compilation takes many seconds

# Per dimension of a head, for each attended pair and for each pair with a position term. Forward:
# q·k and P·v, q·r. Backward: q·k again, dP, dv, dk and a part of dq; q·r again, dr, a part of dq.
CONTENT_FLOP: dict[Pass, int] = {"forward": 4, "backward": 10, "forward+backward": 14}
POSITION_FLOP: dict[Pass, int] = {"forward": 2, "backward": 6, "forward+backward": 8}

# Forward passes on a CPU with at most FEW_QUERIES queries take the time of reading keys, values and
# positions. They use FEW_QUERY_SETS sets of inputs in turn, so that none is in the caches.
FEW_QUERIES, FEW_QUERY_SETS = 8, 8
CHECKED_QUERIES = 256  # on a GPU: the last ones of the first head
# The largest allowed relative error against float64, by Frobenius norm.
GATE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
CHECKED_KEY_HEADS = 2  # of grouped heads on a CPU: the float64 scores of all would need gigabytes


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """A call of `rel_attention`. On a CPU "backward" is timed for ours alone, for its rate.

    Shapes with grouped heads are layers of the Inkling models; on a CPU their peers are Hugging
    Face's implementation and a restatement of it.
    """

    shape: AttentionShape
    dtype: torch.dtype
    direction: Pass
    device: str = "cpu"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"rel_attention/{self.shape.name}/{dtype}/{self.direction}"

    @property
    def peers(self) -> tuple[str, ...]:
        if self.device != "cpu":
            return EAGER, SDPA_BIAS, FLEX
        if self.direction == "backward":
            return ()
        return (HF_RESTATED, HF_SDPA) if self.shape.Hk else (EAGER, COMPILED, SDPA_BIAS)

    @property
    def yardsticks(self) -> tuple[str, ...]:
        if self.device != "cpu":
            return FLASH, CUDNN
        if self.direction == "backward":
            return ()
        return (SDPA_CAUSAL,) if self.shape.Hk else (SDPA_PLAIN,)

    @property
    def in_process(self) -> tuple[str, ...]:
        if self.device != "cpu":
            return OURS, *self.peers, *self.yardsticks
        if self.direction == "backward":
            return ()
        if self.shape.Hk:
            return OURS, HF_RESTATED, SDPA_CAUSAL
        return OURS, EAGER, SDPA_BIAS, SDPA_PLAIN

    @property
    def flop(self) -> int | None:
        return None if self._is_limited_by_reading else self.flop_of(OURS)

    @property
    def bytes_read(self) -> int | None:
        """Keys, values and rows of r, each read once."""
        if not self._is_limited_by_reading:
            return None
        shape = self.shape
        rows = 2 * shape.B * shape.n_key_heads * shape.n_keys * shape.D
        r_heads = 1 if shape.rel_extent else shape.H
        rows += r_heads * shape.n_rows * (shape.d_rel or shape.D)
        return rows * self.dtype.itemsize

    @property
    def _is_limited_by_reading(self) -> bool:
        is_forward = self.direction == "forward"
        return self.device == "cpu" and is_forward and self.shape.Tq <= FEW_QUERIES

    @property
    def tokens(self) -> None:
        return None

    def flop_of(self, name: str) -> int:
        """Useful operations of a contender; a yardstick has its own pairs and no positions."""
        shape, content, position = self.shape, CONTENT_FLOP, POSITION_FLOP
        if name in self.yardsticks:
            n_queries = self._yardstick_queries(name)
            shape = dataclasses.replace(shape, Tq=n_queries, Tm=shape.n_keys - n_queries)
            shape = dataclasses.replace(shape, window=None)
            return content[self.direction] * shape.D * shape.attended_pairs
        products = content[self.direction] * shape.D * shape.attended_pairs
        width = shape.d_rel or shape.D
        return products + position[self.direction] * width * shape.position_pairs

    def tiny(self) -> AttentionCase:
        return dataclasses.replace(self, shape=self.shape.tiny())

    @contextlib.contextmanager
    def contender(self, name: str) -> Iterator[Timed]:
        n_sets = 1 if self.device == "cpu" else INPUT_SETS
        if self._is_limited_by_reading:
            n_sets = FEW_QUERY_SETS
        bound = [self._bound(name, seed) for seed in range(n_sets)]
        yield timer([self._run(*each) for each in bound], torch.device(self.device))

    def _run(
        self, attend: Callable[[], Tensor], leaves: tuple[Tensor, ...]
    ) -> Callable[[], object]:
        if self.direction == "forward":
            return torch.no_grad()(attend)
        dout = self._dout(leaves[0])
        if self.direction == "forward+backward":
            return lambda: torch.autograd.grad(attend(), leaves, dout)
        out = attend()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def check(self, name: str) -> None:
        if name in self.yardsticks:
            return
        if self.device == "cpu":
            checked = self
            if self.shape.Hk:
                fewer = min(self.shape.Hk, CHECKED_KEY_HEADS)
                checked = dataclasses.replace(self, shape=self.shape.with_key_heads(fewer))
            labels, expected = _reference_results(checked.shape, self.dtype, self.direction)
            self._compare(name, labels, expected, checked.results(name))
        else:
            # Only the forward pass, so that FlexAttention is compiled for it only once.
            forward = dataclasses.replace(self, direction="forward")
            self._compare(name, ["out"], *forward._last_queries(name))

    def _compare(
        self, name: str, labels: list[str], expected: list[Tensor], results: list[Tensor]
    ) -> None:
        for label, right, got in zip(labels, expected, results, strict=True):
            error = float((got.double() - right).norm() / right.norm())
            if not error <= GATE[self.dtype]:  # NaN is an error too
                raise WrongResultError(
                    f"{self.name}: {label} of {name} is off by {error:.1e} of its norm; "
                    f"{GATE[self.dtype]:.0e} is allowed"
                )

    def results(self, name: str) -> list[Tensor]:
        attend, leaves = self._bound(name)
        if self.direction == "forward":
            with torch.no_grad():
                return [attend()]
        out = attend()
        return [out.detach(), *torch.autograd.grad(out, leaves, self._dout(out))]

    def _last_queries(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """The first head's output for the last queries: in float64, and a contender's."""
        attend, _ = self._bound(name)
        shape, n = self.shape, min(self.shape.Tq, CHECKED_QUERIES)
        inputs = self._inputs()
        first: dict[str, Any] = {}
        for key, x in inputs._asdict().items():
            if x is not None:
                x = x[:1] if x.dim() == 2 else x[:1, :1]  # head biases are [H, D]
                first[key] = (x[:, :, -n:] if key in ("q", "q_pos") else x).double()
        with torch.no_grad():
            right = rel_attention(
                **first,
                **_options(shape) | {"offset": shape.offset - (shape.Tq - n)},
                key_lens=_key_lens(dataclasses.replace(shape, B=1), self.device),
                backend="reference",
            )
            return [right], [attend()[:1, :1, -n:]]

    def _inputs(self, seed: int = 0) -> AttentionInputs:
        requires_grad = self.direction != "forward"
        return random_inputs(
            self.shape, self.dtype, requires_grad=requires_grad, seed=seed, device=self.device
        )

    def _bound(self, name: str, seed: int = 0) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        """A contender with its inputs, and those of them that get gradients."""
        inputs = self._inputs(seed)
        if name in (SDPA_PLAIN, SDPA_CAUSAL, FLASH, CUDNN):
            n, joined = self._yardstick_queries(name), eager.with_memory(inputs)
            q = inputs.q.repeat(1, 1, -(-n // self.shape.Tq), 1)[:, :, :n]
            leaves = [x.detach().requires_grad_(x.requires_grad) for x in (q, *joined)]
            if name in (FLASH, CUDNN):
                fused = {FLASH: sdpa.flash, CUDNN: sdpa.cudnn}[name]
                return functools.partial(fused, *leaves, causal=self.shape.causal), tuple(leaves)
            without = {SDPA_PLAIN: sdpa.plain, SDPA_CAUSAL: sdpa.causal}[name]
            return functools.partial(without, *leaves), tuple(leaves)
        attend = _attend(name, self.shape, self.device)
        if name == OURS:
            sizes = {"Tq": self.shape.Tq, "D": self.shape.D, "dtype": self.dtype}
            needs_grad = self.direction != "forward"
            backend = preferred_backend(
                "rel_attention", self.device, needs_grad=needs_grad, **sizes
            )
            attend = functools.partial(attend, backend=backend)
        return functools.partial(attend, inputs), inputs.leaves()

    def _yardstick_queries(self, name: str) -> int:
        """cuDNN's causal mask is for as many queries as keys."""
        is_square = name == CUDNN and self.shape.causal and self.shape.Tq > 1
        return self.shape.n_keys if is_square else self.shape.Tq

    def _dout(self, out: Tensor) -> Tensor:
        """A gradient for a tensor like `out`."""
        generator = torch.Generator(out.device).manual_seed(1)
        return torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)


def _attend(name: str, shape: AttentionShape, device: str = "cpu") -> Attend:
    """The implementation `name`, with all arguments bound but the inputs."""
    key_lens = _key_lens(shape, device)
    if name in (OURS, REFERENCE):
        options = _options(shape) | {"key_lens": key_lens}
        options["backend"] = "auto" if name == OURS else "reference"
        return functools.partial(_rel_attention, **options)
    if name == FLEX:
        mask = flex.block_mask(shape, torch.device(device))
        return functools.partial(flex.compiled(), shape, mask)
    if name in (HF_SDPA, HF_RESTATED):
        return _hugging_face(name, shape)
    hidden = eager.hidden_keys(shape.Tq, shape.n_keys, key_lens, shape.causal, device, shape.window)
    if name == SDPA_BIAS:
        return functools.partial(sdpa.with_position_bias, hidden=hidden)
    if name == EAGER:
        return functools.partial(eager.rel_attention, hidden=hidden)
    if name != COMPILED:
        raise ValueError(f"no contender {name!r}")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise PeerUnavailableError("torch.compile needs a C++ compiler, and there is none")
    torch.compiler.reset()  # each shape is compiled; after a few, torch would run eager code
    return functools.partial(torch.compile(eager.rel_attention, dynamic=False), hidden=hidden)


def _hugging_face(name: str, shape: AttentionShape) -> Attend:
    """The attention of a model of Hugging Face; masks and distances are computed once."""
    i, j = torch.arange(shape.Tq)[:, None], torch.arange(shape.n_keys)
    assert shape.d_rel
    assert shape.rel_extent
    window = shape.n_keys if shape.window is None else shape.window
    attends = (j <= i) & (j >= i - window)
    if name == HF_RESTATED:
        attend = functools.partial(inkling.materialised, distance=i - j, attends=attends)
    else:
        mask = None if shape.window is None else attends[None, None]
        attend = inkling.hugging_face(shape.d_rel, shape.rel_extent, shape.n_key_heads, mask)

    def run(inputs: AttentionInputs) -> Tensor:
        q, k, v, r, *_, rel = inputs
        out: Tensor = attend(q, k, v, rel, r[0, 0].flip(0).T, scale=shape.D**-0.5)
        return out

    return run


def _options(shape: AttentionShape) -> dict[str, Any]:
    window = None if shape.window is None else (shape.window, None)
    factors = {"scale": shape.D**-0.5, "pos_scale": 1.0 if shape.d_rel else None}
    return {"causal": shape.causal, "offset": shape.offset, "window": window, **factors}


def _key_lens(shape: AttentionShape, device: str) -> Tensor | None:
    if shape.key_lens is None:
        return None
    return torch.tensor(shape.key_lens[: shape.B], device=device)


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
    dout = AttentionCase(shape, dtype, direction)._dout(inputs.q).double()
    names = [name for name, tensor in inputs._asdict().items() if tensor is not None]
    grads = torch.autograd.grad(out, precise.leaves(), dout)
    return ["out", *(f"d{name}" for name in names)], [out.detach(), *grads]
