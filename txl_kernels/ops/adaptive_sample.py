"""`adaptive_sample`: tokens drawn from an adaptive softmax, without all its probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from txl_kernels.backends.reference import adaptive_sample as reference
from txl_kernels.backends.reference.adaptive_softmax import Cluster
from txl_kernels.ops.adaptive_checks import checked_clusters
from txl_kernels.ops.adaptive_softmax import Tail, adaptive_topk, choose_backend, n_tokens_of
from txl_kernels.ops.autocast import outside_autocast
from txl_kernels.ops.checks import check_int, check_number
from txl_kernels.torch_private import unwrapped

OP = "adaptive_sample"
# Above it, merging the top k of each piece of the vocabulary costs more than one sort.
MERGED_TOKENS = 4096


def adaptive_sample(
    hidden: Tensor,
    head_weight: Tensor,
    tails: Sequence[Tail],
    *,
    cutoffs: Sequence[int],
    head_bias: Tensor | None = None,
    head_proj: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Draws one token per row from p^(1 / temperature), scaled to sum to 1.

    At temperature 1, without `top_k` and `top_p`, it reads the head and then only the clusters that
    were drawn. At other temperatures it reads the vocabulary once, in pieces. `top_p`, and `top_k`
    above 4,096, sort the vocabulary once per row, a few rows at a time. No [N, V] tensor exists.

    Args:
        hidden, head_weight, tails, cutoffs, head_bias, head_proj, backend: as `adaptive_nll`. A
            logit of -inf (a bias, say) forbids its token or cluster.
        temperature: 0 or more; 0 takes the most probable token, and so does a temperature below
            the smallest normal number of the precision (1.2e-38 in float32).
        top_k: draw from the k most probable tokens only; more than V is all of them.
        top_p: draw from the smallest set of tokens, most probable first, whose probabilities (at
            this temperature, after `top_k`) sum to at least p, in (0, 1]. Equally probable tokens
            are kept together unless `top_k` is given.
        generator: on hidden's device; torch's own if None.

    Returns:
        int64 [N].

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.
        ValueError: a logit that was read is NaN or +inf, or all logits of a cluster are -inf.
        BackendUnavailableError: the named backend is missing.

    Precision: as `adaptive_nll`. The host waits for the device.
    """
    temperature = check_number(OP, "temperature", temperature, at_least=0)
    if top_k is not None:
        top_k = check_int(OP, "top_k", top_k, at_least=1)
    if top_p is not None:
        top_p = check_number(OP, "top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"{OP}: top_p must be in (0, 1], got {top_p}")
    hidden, head, clusters = checked_clusters(
        OP, hidden, Cluster(head_proj, head_weight, head_bias), tails, cutoffs
    )
    if hidden.is_meta:
        return hidden.new_empty(hidden.shape[0], dtype=torch.int64)
    limits = torch.finfo(torch.promote_types(hidden.dtype, torch.float32))
    if temperature < limits.tiny:
        temperature, top_k = 1.0, 1
    temperature = min(temperature, limits.max)
    if top_k is not None and top_k >= n_tokens_of(head, clusters):
        top_k = None
    if top_p == 1:
        top_p = None
    if top_k is None or top_k > MERGED_TOKENS:
        choose_backend(OP, backend, hidden, head, clusters)
        with outside_autocast(hidden.device):
            tokens, scores = reference.sample(
                hidden, head, clusters, temperature, top_k, top_p, generator
            )
    else:
        log_probs, top = adaptive_topk(
            hidden,
            head.weight,
            clusters,
            top_k,
            cutoffs=cutoffs,
            head_bias=head.bias,
            head_proj=head.projection,
            backend=backend,
        )
        column, scores = reference.draw_sorted(log_probs, temperature, top_k, top_p, generator)
        tokens = top.gather(1, column[:, None])[:, 0]
    _check_finite(scores)
    return tokens


def _check_finite(scores: Tensor) -> None:
    """`scores` [N] are not finite in rows whose logits are not."""
    wrong = ~unwrapped(scores).isfinite()  # torch.vmap reads no value of a batched tensor
    if wrong.any():
        row = int(wrong.nonzero()[0, -1])
        raise ValueError(
            f"{OP}: the logits of every row must be finite, got NaN or infinity in row {row}; "
            "look for them in hidden, the weights and the biases"
        )
