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
from txl_kernels.transforms import inside_transform

OP = "adaptive_sample"
# Temperatures and probabilities beyond these act as 0 or infinity; float32 has few more digits.
_LEAST, _MOST = 1e-30, 1e30


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

    Holds the logits of one piece of the vocabulary at a time. At temperature 1, without `top_k` and
    `top_p`, it reads the head and then only the clusters that were drawn.

    Args:
        hidden, head_weight, tails, cutoffs, head_bias, head_proj, backend: as `adaptive_nll`.
        temperature: 0 or more; 0, or less than 1e-30, returns the most probable token.
        top_k: draw from the k most probable tokens only; more than V means all of them.
        top_p: draw from the smallest set of most probable tokens whose probabilities (at this
            temperature, after `top_k`) sum to at least p, in (0, 1]. Equally probable tokens are
            kept together unless `top_k` is given.
        generator: on hidden's device; torch's own if None.

    Returns:
        int64 [N].

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.
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
    n_tokens = n_tokens_of(head, clusters)
    temperature = min(temperature, _MOST)
    if temperature < _LEAST:
        temperature, top_k = 0.0, 1
    if top_p is not None:
        top_p = max(top_p, _LEAST)
    if top_k is not None and top_k < n_tokens:
        log_probs, tokens = adaptive_topk(
            hidden,
            head.weight,
            clusters,
            top_k,
            cutoffs=cutoffs,
            head_bias=head.bias,
            head_proj=head.projection,
            backend=backend,
        )
        column = _draw_ordered(log_probs / (temperature or 1.0), top_p, generator)
        return tokens.gather(1, column[:, None])[:, 0]
    if top_p is not None and inside_transform("vmap"):
        raise ValueError(
            f"{OP}: top_p needs top_k inside torch.vmap, where the host can read no token; "
            f"got top_p={top_p}, top_k={top_k}"
        )
    choose_backend(OP, backend, hidden, head, clusters)
    with outside_autocast(hidden.device):
        return reference.sample(hidden, head, clusters, temperature, top_p, generator)


def _draw_ordered(logits: Tensor, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """A column per row of falling logits [N, k]: [N]."""
    probs = logits.softmax(1)
    if top_p is not None:
        before = probs.cumsum(1) - probs
        probs = probs.masked_fill(before >= top_p, 0.0)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]
