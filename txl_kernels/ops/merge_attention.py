"""`merge_attention` and `with_sink`: exact sums of attention over parts of the keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from txl_kernels.ops.checks import (
    FLOATING,
    check_broadcastable,
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)

_LSE = (torch.float32, torch.float64)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combines the attention of the same queries over disjoint sets of keys into that over all.

        lse = ln Σ_n exp(lse_n)        out = Σ_n exp(lse_n - lse) · out_n

    The parts may come from `rel_attention_with_lse` or from any attention that returns the
    logarithm of its softmax's denominator, on one device or gathered from several.

    Args:
        outs: one tensor [B, H, Tq, Dv] per part, at least one, all of one dtype: float32, bfloat16,
            float16 or float64.
        lses: one tensor [B, H, Tq] per part, float32 or float64: natural logarithm of the part's
            denominator, -inf where a query attends to no key of the part. Its out is then ignored.

    Returns:
        out [B, H, Tq, Dv] in the parts' dtype and lse [B, H, Tq] in float32 (float64 for float64).
        A query that attends to no key of any part has out 0 and lse -inf.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device, number or type.

    Gradients: in all arguments, any number of times. If the parts' lse are differentiable, as those
    of `rel_attention_with_lse` are, the gradients are those of one attention over all keys. Where
    a part has no key its gradients are 0, whatever the incoming gradients are, NaN included.

    Precision: computed in float32 (float64 for float64).

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.
    """
    op = "merge_attention"
    for name, tensors in (("outs", outs), ("lses", lses)):
        if not isinstance(tensors, (list, tuple)):
            found = type(tensors).__name__
            raise TypeError(f"{op}: {name} must be a list or tuple of tensors, got {found}")
    if len(outs) != len(lses) or not outs:
        raise ValueError(
            f"{op}: outs and lses must have the same number of parts, at least 1, got "
            f"{len(outs)} and {len(lses)}"
        )
    for n, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_part(op, f"outs[{n}]", out, f"lses[{n}]", lse)
        check_dtype(op, f"outs[{n}]", out, (outs[0].dtype,))
        check_shape(op, f"outs[{n}]", out, outs[0].shape)
        check_device(op, f"outs[{n}]", out, outs[0].device)
    work = _work_dtype(outs[0])
    weights, lse = _weights(torch.stack([lse.to(work) for lse in lses]))
    terms = (
        # The out of a part without keys may be NaN, which a product with 0 would keep.
        weight[..., None] * out.to(work).masked_fill((part == -torch.inf)[..., None], 0.0)
        for weight, out, part in zip(weights.unbind(), outs, lses, strict=True)
    )
    total = next(terms)
    for term in terms:
        total = total + term
    return total.to(outs[0].dtype), lse


def with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Adds one more key to each query's softmax: its score is the sink, its value 0.

        lse' = ln(exp(lse) + exp(sink))        out' = exp(lse - lse') · out

    Args:
        out: [B, H, Tq, Dv]: float32, bfloat16, float16 or float64.
        lse: [B, H, Tq], float32 or float64: natural logarithm of the softmax's denominator, -inf
            where a query attends to no key.
        sink: a floating tensor that broadcasts to [B, H, Tq], such as [H, 1]: the score itself, in
            natural units. No scale multiplies it. -inf means no sink.

    Returns:
        out' [B, H, Tq, Dv] in out's dtype and lse' [B, H, Tq] in float32 (float64 for float64).
        A query without keys has out' 0, and lse' equal to its sink.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, device or type.

    Gradients: in all arguments, any number of times; 0 in out and lse where a query has no key, in
    sink where it is -inf.

    Precision: computed in float32 (float64 for float64).

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
    for sinks; as one learned logit, without a value: OpenAI, gpt-oss, 2025.
    """
    op = "with_sink"
    _check_part(op, "out", out, "lse", lse)
    check_tensor(op, "sink", sink)
    check_dtype(op, "sink", sink, FLOATING)
    check_device(op, "sink", sink, out.device)
    check_broadcastable(op, "sink", sink, lse.shape)
    work = _work_dtype(out)
    parts = torch.stack([lse.to(work), sink.to(work).expand(lse.shape)])
    weights, merged = _weights(parts)
    kept = out.to(work).masked_fill((lse == -torch.inf)[..., None], 0.0)
    return (weights[0][..., None] * kept).to(out.dtype), merged


def _weights(lses: Tensor) -> tuple[Tensor, Tensor]:
    """Each part's share of the denominator [N, …], and the logarithm of the whole one […].

    Both branches of each `where` are finite, so that no gradient is 0 · NaN or 0 · infinity.
    """
    has_keys = lses != -torch.inf
    any_keys = has_keys.any(0)
    largest = lses.detach().amax(0).masked_fill(~any_keys, 0.0)
    terms = torch.where(has_keys, lses - largest, 0.0).exp().masked_fill(~has_keys, 0.0)
    total = terms.sum(0).masked_fill(~any_keys, 1.0)
    return terms / total, torch.where(any_keys, largest + total.log(), -torch.inf)


def _work_dtype(out: Tensor) -> torch.dtype:
    return torch.float64 if out.dtype == torch.float64 else torch.float32


def _check_part(op: str, out_name: str, out: Tensor, lse_name: str, lse: Tensor) -> None:
    """Raises unless out [B, H, Tq, Dv] and lse [B, H, Tq] fit each other."""
    check_tensor(op, out_name, out)
    check_dtype(op, out_name, out, FLOATING)
    check_shape(op, out_name, out, ("B", "H", "Tq", "Dv"))
    check_tensor(op, lse_name, lse)
    check_dtype(op, lse_name, lse, _LSE)
    check_shape(op, lse_name, lse, out.shape[:3])
    check_device(op, lse_name, lse, out.device)
