"""Adaptive softmax: loss, loss per token, log-probabilities and the most probable tokens.

    -log p(token) = -log p_head(token or its cluster's column) - log p_tail(token in its cluster)

The head holds tokens 0 … c0 - 1 and after them one column per tail cluster, in natural order.
Source: Grave et al., "Efficient softmax approximation for GPUs", ICML 2017; the projections are
Transformer-XL's (Dai et al., ACL 2019; Baevski and Auli, ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from txl_kernels._register_adaptive import is_one_table
from txl_kernels.backends import choose, operators
from txl_kernels.backends.reference import adaptive_softmax as reference
from txl_kernels.backends.reference.adaptive_softmax import Cluster
from txl_kernels.ops.adaptive_checks import check_tokens, checked_clusters
from txl_kernels.ops.autocast import outside_autocast
from txl_kernels.ops.checks import check_choice, check_given, check_int, check_shape, check_tensor
from txl_kernels.ops.checks import needs_grad as any_needs_grad
from txl_kernels.transforms import is_jit_tracing

Tail = tuple[Tensor | None, Tensor, Tensor | None]


def adaptive_nll(
    hidden: Tensor,
    target: Tensor,
    head_weight: Tensor,
    tails: Sequence[Tail],
    *,
    cutoffs: Sequence[int],
    head_bias: Tensor | None = None,
    head_proj: Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Each token's loss in token order: -log p(target), in nats.

    Args:
        hidden: [N, d]; float32, bfloat16, float16 or float64.
        target: int64 [N]: in [0, V), or `ignore_index`, which gives loss and gradient 0; that row
            of hidden may hold anything, NaN and infinity included.
        head_weight: [c0 + n_tails, d_0], hidden's dtype.
        tails: per tail cluster (projection [d_k, d] or None, weight [V_k, d_k], bias [V_k] or
            None); all matrices in `nn.Linear`'s orientation.
        cutoffs: first token of each tail; () and no tails is a plain linear cross entropy.
        head_bias: [c0 + n_tails], float32 or hidden's dtype, as all biases.
        head_proj: [d_0, d].
        ignore_index: targets of this value are not scored.
        backend: "auto", "reference", "native" or "triton"; a named one runs or raises.

    Returns:
        [N] float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.
        IndexError: a target out of range, on the CPU; elsewhere (and on the reference under
            `torch.compile`) the device asserts.
        BackendUnavailableError: the named backend is missing.

    Precision: sums in float32 (float64 for float64); bfloat16 and float16 products where the
    backend has them. No N × V logits, forward or backward; a cluster without targets gets a zero
    gradient. A second derivative raises, except on the reference.
    """
    op = "adaptive_nll"
    hidden, head, clusters = checked_clusters(
        op, hidden, Cluster(head_proj, head_weight, head_bias), tails, cutoffs
    )
    _check_target(op, target, hidden)
    ignore_index = check_int(op, "ignore_index", ignore_index)

    def arguments() -> tuple[Any, ...]:
        return hidden, target, _flat(hidden, head, clusters), ignore_index

    chosen = choose_backend(op, backend, hidden, head, clusters, arguments)
    with outside_autocast(hidden.device):
        if chosen == "reference":
            check_tokens(op, "target", target, n_tokens_of(head, clusters), ignore_index)
            return reference.nll(hidden, target, head, clusters, ignore_index)
        flat = _flat(hidden, head, clusters)
        nll, _lse = operators(chosen).adaptive_nll_fwd(hidden, target, flat, ignore_index)
        return cast(Tensor, nll)


def adaptive_loss(
    hidden: Tensor,
    target: Tensor,
    head_weight: Tensor,
    tails: Sequence[Tail],
    *,
    cutoffs: Sequence[int],
    head_bias: Tensor | None = None,
    head_proj: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Mean or sum of `adaptive_nll` over the targets that are not ignored: the training path.

    If gradients are needed, they are computed with the loss, except on the reference. Backward
    returns these buffers, so it can run once through this call.

    Args, Raises and Precision: as `adaptive_nll`; `reduction` is "mean" or "sum".

    Returns:
        Scalar in nats, float32 (float64 for float64); 0 where every target is ignored.
    """
    op = "adaptive_loss"
    check_choice(op, "reduction", reduction, ("mean", "sum"))
    hidden, head, clusters = checked_clusters(
        op, hidden, Cluster(head_proj, head_weight, head_bias), tails, cutoffs
    )
    _check_target(op, target, hidden)
    ignore_index = check_int(op, "ignore_index", ignore_index)
    members = [x for cluster in (head, *clusters) for x in cluster]

    def arguments() -> tuple[Any, ...]:
        needed = [any_needs_grad(x) for x in (hidden, *members)]
        flat = _flat(hidden, head, clusters)
        return hidden, target, flat, ignore_index, reduction == "mean", needed

    chosen = choose_backend(op, backend, hidden, head, clusters, arguments)
    with outside_autocast(hidden.device):
        if chosen == "reference":
            check_tokens(op, "target", target, n_tokens_of(head, clusters), ignore_index)
            return reference.loss(hidden, target, head, clusters, ignore_index, reduction)
        flat = _flat(hidden, head, clusters)
        if is_jit_tracing():  # it records no list of flags
            nll, _lse = operators(chosen).adaptive_nll_fwd(hidden, target, flat, ignore_index)
            return reference.reduced(nll, target, ignore_index, reduction)
        needed = [any_needs_grad(x) for x in (hidden, *members)]
        if chosen == "native" and is_one_table(flat, needed):
            needed.append(True)
        mean = reduction == "mean"
        loss, *_grads = operators(chosen).adaptive_loss_fwd(
            hidden, target, flat, ignore_index, mean, needed
        )
        return cast(Tensor, loss)


def adaptive_log_prob(
    hidden: Tensor,
    head_weight: Tensor,
    tails: Sequence[Tail],
    *,
    cutoffs: Sequence[int],
    head_bias: Tensor | None = None,
    head_proj: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """log p of all V tokens, in nats.

    Args, Raises and Precision: as `adaptive_nll`, without target.

    Returns:
        [N, V] float32 (float64 for float64), differentiable.
    """
    op = "adaptive_log_prob"
    hidden, head, clusters = checked_clusters(
        op, hidden, Cluster(head_proj, head_weight, head_bias), tails, cutoffs
    )
    choose_backend(op, backend, hidden, head, clusters)
    with outside_autocast(hidden.device):
        return reference.log_prob(hidden, head, clusters)


def adaptive_topk(
    hidden: Tensor,
    head_weight: Tensor,
    tails: Sequence[Tail],
    k: int,
    *,
    cutoffs: Sequence[int],
    head_bias: Tensor | None = None,
    head_proj: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of each row, most probable first, without [N, V].

    Args, Raises and Precision: as `adaptive_nll`, without target; k in [1, V].

    Returns:
        log p [N, k] in nats, float32 (float64 for float64), and tokens int64 [N, k]; neither
        carries a gradient.
    """
    op = "adaptive_topk"
    hidden, head, clusters = checked_clusters(
        op, hidden, Cluster(head_proj, head_weight, head_bias), tails, cutoffs
    )
    k = check_int(op, "k", k, at_least=1)
    if k > n_tokens_of(head, clusters):
        raise ValueError(f"{op}: k must be at most V = {n_tokens_of(head, clusters)}, got {k}")
    with torch.no_grad():
        choose_backend(op, backend, hidden, head, clusters)
    with outside_autocast(hidden.device), torch.no_grad():
        return reference.topk(hidden, head, clusters, k)


def _check_target(op: str, target: Tensor, hidden: Tensor) -> None:
    check_tensor(op, "target", target)
    check_given(op, {"target": target}, (torch.int64,), hidden.device)
    check_shape(op, "target", target, (hidden.shape[0],))


def choose_backend(
    op: str,
    backend: str,
    hidden: Tensor,
    head: Cluster,
    tails: Sequence[Cluster],
    arguments: Callable[[], Sequence[Any]] | None = None,
) -> str:
    """The backend that runs the call; raises BackendUnavailableError if there is none.

    `arguments` returns those of the operator, where the op has kernels.
    """
    weights = [tensor for cluster in (head, *tails) for tensor in cluster]
    return choose(
        op,
        hidden,
        arguments=arguments,
        backend=backend,
        dtype=hidden.dtype,
        Tq=hidden.shape[0],
        needs_grad=any_needs_grad(hidden, *weights),
    )


def _flat(hidden: Tensor, head: Cluster, tails: Sequence[Cluster]) -> list[Tensor]:
    """The schema's list: three tensors per cluster, an empty one for an absent one."""
    absent = hidden.new_empty(0)
    return [absent if x is None else x for cluster in (head, *tails) for x in cluster]


def n_tokens_of(head: Cluster, tails: Sequence[Cluster]) -> int:
    """V."""
    return head.weight.shape[0] - len(tails) + sum(tail.weight.shape[0] for tail in tails)
