"""One problem per op, of a realistic shape but small: inputs, call, plain formula, peer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import txl_kernels
from txl_kernels.testing import rel_attention as attention
from txl_kernels.testing.rel_attention_cases import RelAttentionCase

Leaves = dict[str, Tensor]  # the floating tensors of a call

SOFTMAX_PEER = "torch.nn.AdaptiveLogSoftmaxWithLoss"
# Two clusters after the shortlist, of a quarter and a sixteenth of the model's width.
N, V, D_MODEL, CUTOFFS = 256, 10_000, 256, (1_000, 4_000)
WIDTHS = (D_MODEL, D_MODEL // 4, D_MODEL // 16)
SIZES = (CUTOFFS[0], CUTOFFS[1] - CUTOFFS[0], V - CUTOFFS[1])
TOP = 40


@dataclass(frozen=True)
class Problem:
    """One call of an op. `eager` computes it with every intermediate in the inputs' dtype.

    Attributes:
        op: name of the public op.
        name: shown to the reader instead of `op`, if not empty.
        leaves: returns the floating inputs, in a dtype on a device.
        call: the op on a named backend.
        eager: the formula in plain PyTorch.
        peer: the same computation as a user of torch would write it; None: `eager`.
        peer_name: name of the peer for the reader.
        has_gradients: whether the backward pass is checked.
        magnitudes: from the leaves and the output's gradient, the largest product of magnitudes in
            each leaf's gradient; without it all gradients are compared by their norms.
        sums: leaves whose gradients are compared by their norms.
        Tq: number of queries or tokens.
    """

    op: str
    leaves: Callable[[torch.dtype, str], Leaves]
    call: Callable[[Leaves, str], Tensor]
    eager: Callable[[Leaves], Tensor]
    peer_name: str
    peer: Callable[[Leaves], Tensor] | None = None
    has_gradients: bool = True
    magnitudes: Callable[[Leaves, Tensor], Mapping[str, float]] | None = None
    sums: Sequence[str] = ()
    name: str = ""
    Tq: int = N


def problems() -> tuple[Problem, ...]:
    """Every op but `adaptive_sample`, whose result is random."""
    training = RelAttentionCase("training", H=4, Tq=128, Tm=128, D=64, options={"causal": True})
    decoding = RelAttentionCase("decoding", B=4, H=4, Tq=1, Tm=511, D=64, options={"causal": True})
    return (
        _rel_attention(training),
        _rel_attention(decoding),
        _rel_shift(),
        _adaptive_loss(),
        _adaptive_nll(),
        _adaptive_log_prob(),
        _adaptive_topk(),
        _adaptive_embedding(),
    )


def _rel_attention(case: RelAttentionCase) -> Problem:
    decodes = case.Tq == 1

    def call(x: Leaves, backend: str) -> Tensor:
        arguments: dict[str, Any] = {**x, **case.options, "backend": backend}
        out: Tensor = txl_kernels.rel_attention(**arguments)
        return out

    def magnitudes(leaves: Leaves, dout: Tensor) -> Mapping[str, float]:
        found = attention.gradient_magnitudes(leaves, dout, case.options)
        return {name.removeprefix("d"): value for name, value in found.items()}

    return Problem(
        op="rel_attention",
        name="rel_attention, Tq 1" if decodes else "",
        leaves=lambda dtype, device: case.inputs(dtype, device)[0],
        call=call,
        eager=lambda x: attention.eager(x, {}, case.options)[0],
        peer=_sdpa_with_bias,
        peer_name="SDPA with the position scores as its mask",
        has_gradients=not decodes,
        magnitudes=magnitudes,
        sums=attention.SUMS,
        Tq=case.Tq,
    )


def _sdpa_with_bias(x: Leaves) -> Tensor:
    q = x["q"]
    keys, values = (torch.cat([x[f"mem_{name}"], x[name]], dim=2) for name in ("k", "v"))
    position = (q + x["r_r_bias"][:, None]) @ x["r"].mT  # [B, H, Tq, R]
    bias = _pad_and_view(position) * q.shape[3] ** -0.5
    Tq, Tk = bias.shape[-2:]
    after = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(1 + Tk - Tq)
    bias = bias.masked_fill(after, -torch.inf)
    return F.scaled_dot_product_attention(q + x["r_w_bias"][:, None], keys, values, attn_mask=bias)


def _pad_and_view(x: Tensor) -> Tensor:
    """The original's relative shift: a column of zeros, two views. [..., Tq, R]."""
    Tq, R = x.shape[-2:]
    padded = F.pad(x, (1, 0)).view(*x.shape[:-2], R + 1, Tq)
    return padded[..., 1:, :].reshape(x.shape)


def _rel_shift() -> Problem:
    return Problem(
        op="rel_shift",
        leaves=lambda dtype, device: {"x": _normal(_generator(), 2, 8, 128, 256).to(device, dtype)},
        call=lambda x, backend: txl_kernels.rel_shift(x["x"], backend=backend),
        eager=lambda x: txl_kernels.rel_shift(x["x"], backend="reference"),
        peer=lambda x: _pad_and_view(x["x"]),
        peer_name="the original's pad and view",
        magnitudes=lambda _, dout: {"x": float(dout.abs().max())},
        Tq=128,
    )


class _TorchSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's module, whose `forward` returns what `method` selects."""

    def __init__(self, method: str) -> None:
        super().__init__(D_MODEL, V, list(CUTOFFS), div_value=4.0, head_bias=True, device="meta")
        self.method = method

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        if self.method == "log_prob":
            return self.log_prob(hidden)
        output: Tensor
        loss: Tensor
        output, loss = super().forward(hidden, target)
        return loss if self.method == "loss" else -output


def torch_softmax(method: str) -> Callable[[Leaves], Tensor]:
    """torch's module as a function of `softmax_leaves`: "loss", "nll" or "log_prob"."""
    module = _TorchSoftmax(method)

    def run(x: Leaves) -> Tensor:
        weights = {name: leaf for name, leaf in x.items() if name != "hidden"}
        inputs = (x["hidden"], zipf_tokens(N, x["hidden"].device))
        result: Tensor = torch.func.functional_call(module, weights, inputs)
        return result

    return run


def _softmax(
    op: str,
    method: str,
    call: Callable[..., Tensor],
    *,
    after: Callable[[Tensor], Tensor] = lambda result: result,
    has_gradients: bool = True,
) -> Problem:
    """A problem of an adaptive softmax.

    Args:
        op: name of the public op.
        method: the method of torch's module that computes the same.
        call: the op with keyword arguments.
        after: applied to the result of torch's module.
        has_gradients: whether the backward pass is checked.
    """
    module = torch_softmax(method)

    return Problem(
        op=op,
        leaves=softmax_leaves,
        call=lambda x, backend: call(**softmax_arguments(x), backend=backend),
        eager=lambda x: after(module(x)),
        peer_name=SOFTMAX_PEER,
        has_gradients=has_gradients,
    )


def _adaptive_loss() -> Problem:
    def call(hidden: Tensor, **others: Any) -> Tensor:
        return txl_kernels.adaptive_loss(hidden, zipf_tokens(N, hidden.device), **others)

    return _softmax("adaptive_loss", "loss", call)


def _adaptive_nll() -> Problem:
    def call(hidden: Tensor, **others: Any) -> Tensor:
        return txl_kernels.adaptive_nll(hidden, zipf_tokens(N, hidden.device), **others)

    return _softmax("adaptive_nll", "nll", call)


def _adaptive_log_prob() -> Problem:
    return _softmax("adaptive_log_prob", "log_prob", txl_kernels.adaptive_log_prob)


def _adaptive_topk() -> Problem:
    def call(**arguments: Any) -> Tensor:
        return txl_kernels.adaptive_topk(**arguments, k=TOP)[0]

    def top(log_probs: Tensor) -> Tensor:
        return log_probs.topk(TOP, dim=1)[0]

    return _softmax("adaptive_topk", "log_prob", call, after=top, has_gradients=False)


def softmax_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of an adaptive softmax's inputs; the weights have the names of torch's module."""
    shapes: dict[str, tuple[int, ...]] = {
        "hidden": (N, D_MODEL),
        "head.weight": (SIZES[0] + len(CUTOFFS), D_MODEL),
        "head.bias": (SIZES[0] + len(CUTOFFS),),
    }
    for k, (size, width) in enumerate(zip(SIZES[1:], WIDTHS[1:], strict=True)):
        shapes |= {f"tail.{k}.0.weight": (width, D_MODEL), f"tail.{k}.1.weight": (size, width)}
    return shapes


def softmax_leaves(dtype: torch.dtype, device: str) -> Leaves:
    """Random inputs of an adaptive softmax."""
    generator = _generator()
    return {
        name: (_normal(generator, *shape) * shape[-1] ** -0.5).to(device, dtype)
        for name, shape in softmax_shapes().items()
    }


def softmax_arguments(x: Leaves) -> dict[str, Any]:
    """The inputs as arguments of the public ops."""
    return {
        "hidden": x["hidden"],
        "head_weight": x["head.weight"],
        "head_bias": x["head.bias"],
        "tails": [
            (x[f"tail.{k}.0.weight"], x[f"tail.{k}.1.weight"], None) for k in range(len(CUTOFFS))
        ],
        "cutoffs": CUTOFFS,
    }


def _adaptive_embedding() -> Problem:
    n_tokens, scale = 1_024, math.sqrt(D_MODEL)

    def leaves(dtype: torch.dtype, device: str) -> Leaves:
        generator, found = _generator(), {}
        for k, (size, width) in enumerate(zip(SIZES, WIDTHS, strict=True)):
            found[f"table.{k}"] = _normal(generator, size, width)
            found[f"projection.{k}"] = _normal(generator, D_MODEL, width) * width**-0.5
        return {name: x.to(device, dtype) for name, x in found.items()}

    def parts(x: Leaves) -> tuple[list[Tensor], list[Tensor]]:
        clusters = range(len(SIZES))
        return [x[f"table.{k}"] for k in clusters], [x[f"projection.{k}"] for k in clusters]

    def call(x: Leaves, backend: str) -> Tensor:
        tables, projections = parts(x)
        tokens = zipf_tokens(n_tokens, tables[0].device)
        return txl_kernels.adaptive_embedding(
            tokens, tables, projections, CUTOFFS, scale, backend=backend
        )

    def table_by_table(x: Leaves) -> Tensor:
        tables, projections = parts(x)
        tokens = zipf_tokens(n_tokens, tables[0].device)
        out: Tensor = tables[0].new_zeros(n_tokens, D_MODEL)
        first = 0
        for table, projection in zip(tables, projections, strict=True):
            places = ((tokens >= first) & (tokens < first + len(table))).nonzero()[:, 0]
            rows = F.embedding(tokens[places] - first, table)
            out = out.index_copy(0, places, F.linear(rows, projection))
            first += len(table)
        return out * scale

    return Problem(
        op="adaptive_embedding",
        leaves=leaves,
        call=call,
        eager=table_by_table,
        peer_name="F.embedding and F.linear, table by table",
        Tq=n_tokens,
    )


@functools.cache
def zipf_tokens(n: int, device: torch.device) -> Tensor:
    """Token numbers in [0, V - 1), frequent for small numbers as words are: P(<= v) ~ log v."""
    uniform = torch.rand(n, generator=_generator(), device="cpu", dtype=torch.float64)
    return (V**uniform).long().sub(1).to(device)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
