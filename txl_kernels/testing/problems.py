"""One problem per op, of a realistic shape but small: its arguments, and a peer to compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from txl_kernels.testing.adaptive_softmax import embedding_arguments, softmax_arguments
from txl_kernels.testing.adaptive_softmax_cases import AdaptiveSoftmaxCase, Inputs
from txl_kernels.testing.comparison import TOP, clusters, named
from txl_kernels.testing.rel_attention import attention_arguments
from txl_kernels.testing.rel_attention_cases import RelAttentionCase

SOFTMAX_PEER = "torch.nn.AdaptiveLogSoftmaxWithLoss"
# Two clusters after the shortlist, of a quarter and a sixteenth of the model's width.
SOFTMAX = AdaptiveSoftmaxCase("softmax", V=10_000, cutoffs=(1_000, 4_000), N=256, d=256, div=4)


@dataclass(frozen=True)
class Problem:
    """One call of an op.

    Attributes:
        op: name of the public op.
        arguments: returns those of the operator (see `comparison`), in a dtype on a device.
        peer: the same computation as a user of torch would write it.
        peer_name: name of the peer for the reader.
        name: shown to the reader instead of `op`, if not empty.
        has_gradients: whether the backward pass is checked.
        Tq: number of queries or tokens.
    """

    op: str
    arguments: Callable[[torch.dtype, str], list[Any]]
    peer: Callable[[list[Any]], Tensor]
    peer_name: str
    name: str = ""
    has_gradients: bool = True
    Tq: int = SOFTMAX.N


def problems() -> tuple[Problem, ...]:
    """Every op but `adaptive_sample`, whose result is random."""
    training = RelAttentionCase("training", H=4, Tq=128, Tm=128, D=64, options={"causal": True})
    decoding = RelAttentionCase("decoding", B=4, H=4, Tq=1, Tm=511, D=64, options={"causal": True})
    return (
        _rel_attention(training),
        _rel_attention(decoding, name="rel_attention, Tq 1", has_gradients=False),
        Problem(
            "rel_shift", _shift_arguments, _pad_and_view, "the original's pad and view", Tq=128
        ),
        _softmax("adaptive_loss"),
        _softmax("adaptive_nll"),
        _softmax("adaptive_log_prob"),
        _softmax("adaptive_topk", has_gradients=False),
        Problem(
            "adaptive_embedding",
            lambda dtype, device: embedding_arguments(softmax_inputs(dtype, device, 1024), 16.0),
            _table_by_table,
            "F.embedding and F.linear, table by table",
            Tq=1024,
        ),
        Problem(
            "few_row_linear",
            _linear_arguments,
            lambda x: F.linear(*x[:3]),
            "F.linear",
            has_gradients=False,
            Tq=8,
        ),
    )


def _rel_attention(case: RelAttentionCase, **options: Any) -> Problem:
    return Problem(
        "rel_attention",
        lambda dtype, device: attention_arguments(case, *case.inputs(dtype, device)),
        _sdpa_with_bias,
        "SDPA with the position scores as its mask",
        Tq=case.Tq,
        **options,
    )


def _sdpa_with_bias(arguments: list[Any]) -> Tensor:
    x = named("rel_attention", arguments)
    q = x["q"]
    keys, values = (torch.cat([x[f"mem_{name}"], x[name]], dim=2) for name in ("k", "v"))
    position = (q + x["r_r_bias"][:, None]) @ x["r"].mT  # [B, H, Tq, R]
    bias = _pad_and_view([position]) * q.shape[3] ** -0.5
    Tq, Tk = bias.shape[-2:]
    after = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(1 + Tk - Tq)
    bias = bias.masked_fill(after, -torch.inf)
    return F.scaled_dot_product_attention(q + x["r_w_bias"][:, None], keys, values, attn_mask=bias)


def _pad_and_view(arguments: list[Any]) -> Tensor:
    """The original's relative shift: a column of zeros, two views. [..., Tq, R]."""
    x: Tensor = arguments[0]
    Tq, R = x.shape[-2:]
    padded = F.pad(x, (1, 0)).view(*x.shape[:-2], R + 1, Tq)
    return padded[..., 1:, :].reshape(x.shape)


def _shift_arguments(dtype: torch.dtype, device: str) -> list[Any]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 8, 128, 256, generator=generator, device="cpu").to(device, dtype)
    return [x.requires_grad_(), 256, 127]


def _linear_arguments(dtype: torch.dtype, device: str) -> list[Any]:
    generator = torch.Generator().manual_seed(11)
    x, weight, bias = (
        torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
        for shape in ((8, 512), (1536, 512), (1536,))
    )
    return [x, weight * 512**-0.5, bias, None]


def _softmax(op: str, *, has_gradients: bool = True) -> Problem:
    """A problem of an adaptive softmax without head projection and tail biases, as torch's."""
    return Problem(
        op,
        lambda dtype, device: _softmax_arguments(op, dtype, device),
        functools.partial(torch_softmax, op),
        SOFTMAX_PEER,
        has_gradients=has_gradients,
    )


def _softmax_arguments(op: str, dtype: torch.dtype, device: str) -> list[Any]:
    hidden, target, (_, weight, bias), tails = softmax_inputs(dtype, device)
    tails = [(*tail[:2], None) for tail in tails]
    arguments = softmax_arguments(op, (hidden, target, (None, weight, bias), tails))
    if op == "adaptive_loss":
        arguments[4] = True  # the mean, as torch's
    return arguments


class _TorchSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's module, whose `forward` returns the result of one op."""

    def forward(self, op: str, hidden: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        if op in ("adaptive_nll", "adaptive_loss"):
            found: tuple[Tensor, Tensor] = super().forward(hidden, target)
            return -found[0] if op == "adaptive_nll" else found[1]
        log_probs = self.log_prob(hidden)
        return log_probs if op == "adaptive_log_prob" else log_probs.topk(TOP)[0]


@functools.cache
def _torch_module() -> _TorchSoftmax:
    sizes = (SOFTMAX.d, SOFTMAX.V, list(SOFTMAX.cutoffs))
    return _TorchSoftmax(*sizes, div_value=4.0, head_bias=True, device="meta")


def torch_softmax(op: str, arguments: list[Any]) -> Tensor:
    """The result of torch's module."""
    hidden, target, flat, *_ = arguments
    head, *tails = clusters(flat)
    weights: dict[str, Any] = {"head.weight": head.weight, "head.bias": head.bias}
    for k, tail in enumerate(tails):
        weights |= {f"tail.{k}.0.weight": tail.projection, f"tail.{k}.1.weight": tail.weight}
    result: Tensor = torch.func.functional_call(_torch_module(), weights, (op, hidden, target))
    return result


def _table_by_table(arguments: list[Any]) -> Tensor:
    tokens, tables, projections, scale, _ = arguments
    out: Tensor = tables[0].new_zeros(len(tokens), SOFTMAX.d)
    first = 0
    for table, projection in zip(tables, projections, strict=True):
        places = ((tokens >= first) & (tokens < first + len(table))).nonzero()[:, 0]
        rows = F.embedding(tokens[places] - first, table)
        out = out.index_copy(0, places, F.linear(rows, projection))
        first += len(table)
    return out.mul(scale)


def softmax_inputs(dtype: torch.dtype, device: str, N: int = SOFTMAX.N) -> Inputs:
    """Inputs whose tokens are frequent for small numbers, as words are: P(<= v) ~ log v."""
    hidden, _, head, tails = replace(SOFTMAX, N=N).inputs(dtype, device)
    generator = torch.Generator().manual_seed(11)
    uniform = torch.rand(N, generator=generator, device="cpu", dtype=torch.float64)
    return hidden, (SOFTMAX.V**uniform).long().sub(1).to(device), head, tails
