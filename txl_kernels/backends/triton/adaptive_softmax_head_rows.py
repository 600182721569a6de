"""Kernels over rows of the head's logits: log-sum-exp, loss, gradient."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.triton.adaptive_buckets import cluster_of, first_tokens
from txl_kernels.backends.triton.adaptive_configs import head_options
from txl_kernels.backends.triton.launching import launch

LOG2E = tl.constexpr(1.4426950408889634)
# The largest logit of a row before the first: finite, as differences of infinities are NaN.
LOWEST = tl.constexpr(-3.4028234e38)
_ALIGNMENT = 32
_ROW_ALIGNMENT = tl.constexpr(_ALIGNMENT)


class Targets(NamedTuple):
    """The targets, and the sizes that give each its column of the head."""

    target: Tensor  # [N] int64
    sizes: tuple[int, ...]  # tokens of the head and of each tail
    ignore_index: int


def padded(n_columns: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-n_columns // _ALIGNMENT) * _ALIGNMENT


@triton.jit
def _head_column(p_target, i_n, firsts, V, ignore_index, N_CLUSTERS: tl.constexpr):
    """Token i_n's column: its own, or its tail's after the shortlist; -1 where ignored."""
    token = tl.load(p_target + i_n)
    cluster, column = cluster_of(token, firsts, V, ignore_index, N_CLUSTERS)
    if N_CLUSTERS > 1:
        c0 = firsts[1]
        column = tl.where(cluster > 0, c0 + cluster - 1, column).to(tl.int32)
    return tl.where(cluster >= N_CLUSTERS, -1, column)


@triton.jit
def in_row(o_column, n_columns):
    """Whether a row of logits has memory there: whole vectors, also after an odd last column."""
    return o_column < (n_columns + _ROW_ALIGNMENT - 1) // _ROW_ALIGNMENT * _ROW_ALIGNMENT


@triton.jit
def _load_logits(p_logits, p_bias, o_column, n_columns, HAS_BIAS: tl.constexpr):
    """float32, -inf from n_columns on."""
    logits = tl.load(p_logits + o_column, mask=in_row(o_column, n_columns), other=0.0)
    m_column = o_column < n_columns
    if HAS_BIAS:
        logits += tl.load(p_bias + o_column, mask=m_column, other=0.0).to(tl.float32)
    return tl.where(m_column, logits, float("-inf"))


@triton.jit
def _row_lse(
    p_logits, p_bias, column, n_columns, largest, total, at_target,
    HAS_BIAS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds one row's n_columns logits to (largest, Σ exp(logit - largest), the target's)."""
    for start in range(0, n_columns, BLOCK_V):
        o_column = start + tl.arange(0, BLOCK_V)
        logits = _load_logits(p_logits, p_bias, o_column, n_columns, HAS_BIAS)
        larger = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp2((largest - larger) * LOG2E)
        total += tl.sum(tl.exp2((logits - larger) * LOG2E), 0)
        m_target = (o_column == column) & (o_column < n_columns)
        at_target += tl.sum(tl.where(m_target, logits, 0.0), 0)
        largest = larger
    return largest, total, at_target


@triton.jit
def _adaptive_head_lse_kernel(
    p_logits,  # [N, n_columns] float32: those from first_column on
    p_bias,  # [n_columns]
    p_target,  # [N]
    p_state,  # [3, N] float32: largest, total, at_target over the columns before
    p_nll,  # [N], written with the last columns
    p_largest,  # [N], likewise
    p_log_sum,  # [N], likewise
    firsts,
    N,
    V,
    ignore_index,
    first_column,
    n_columns,
    stride_logits,
    HAS_BIAS: tl.constexpr,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    N_CLUSTERS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds a block of columns to one token's online log-sum-exp; writes the loss at the last.

    One program per token, the columns in order, float32 sums: deterministic. The loss is the
    head's part, 0 where the target is ignored.
    """
    i_n = tl.program_id(0)
    column = _head_column(p_target, i_n, firsts, V, ignore_index, N_CLUSTERS)
    largest = LOWEST
    total = 0.0
    at_target = 0.0
    if not IS_FIRST:
        largest = tl.load(p_state + i_n)
        total = tl.load(p_state + N + i_n)
        at_target = tl.load(p_state + 2 * N + i_n)
    largest, total, at_target = _row_lse(
        p_logits + i_n.to(tl.int64) * stride_logits, p_bias, column - first_column, n_columns,
        largest, total, at_target, HAS_BIAS, BLOCK_V,
    )  # fmt: skip
    if IS_LAST:
        log_sum = tl.log(total)
        tl.store(p_largest + i_n, largest)
        tl.store(p_log_sum + i_n, log_sum)
        tl.store(p_nll + i_n, tl.where(column >= 0, (largest - at_target) + log_sum, 0.0))
    else:
        tl.store(p_state + i_n, largest)
        tl.store(p_state + N + i_n, total)
        tl.store(p_state + 2 * N + i_n, at_target)


@triton.jit
def _adaptive_head_grad_kernel(
    p_logits,  # [n, n_columns] float32: those from first_column on
    p_grad,  # [n, n_columns]; may be p_logits itself
    p_bias,  # [n_columns]
    p_target,  # [n]
    p_nll,  # [n], written unless HAS_LSE
    p_largest,  # [n], read if HAS_LSE
    p_log_sum,  # [n], read if HAS_LSE
    p_factor,  # [n], read if HAS_LSE
    firsts,
    V,
    ignore_index,
    first_column,
    n_columns,
    stride_logits,
    stride_grad,
    HAS_BIAS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    N_CLUSTERS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token's logits become (softmax - onehot) · factor, 0 where the target is ignored.

    One program per token. Without HAS_LSE the row is whole: the program reads it twice, the second
    time from cache, and writes the head's part of the loss; the factor is 1. Works in place if
    p_grad is p_logits: an element of the gradient depends on its own logit, and on sums over the
    row that are complete by then. Sums are float32 in a fixed order: deterministic.
    """
    i_n = tl.program_id(0)
    column = _head_column(p_target, i_n, firsts, V, ignore_index, N_CLUSTERS)
    counts = column >= 0
    column -= first_column
    p_row = p_logits + i_n.to(tl.int64) * stride_logits
    largest = LOWEST
    total = 0.0
    at_target = 0.0
    factor = 1.0
    if HAS_LSE:
        largest = tl.load(p_largest + i_n)
        log_sum = tl.load(p_log_sum + i_n)
        factor = tl.load(p_factor + i_n)
    else:
        largest, total, at_target = _row_lse(
            p_row, p_bias, column, n_columns, largest, total, at_target, HAS_BIAS, BLOCK_V
        )
        log_sum = tl.log(total)
        tl.store(p_nll + i_n, tl.where(counts, (largest - at_target) + log_sum, 0.0))
    factor = tl.where(counts, factor, 0.0)
    for start in range(0, n_columns, BLOCK_V):
        o_column = start + tl.arange(0, BLOCK_V)
        logits = _load_logits(p_row, p_bias, o_column, n_columns, HAS_BIAS)
        # Another kernel of cuBLAS may have rounded the forward pass's logits differently.
        log_p = tl.minimum(logits - largest, 0.0) - log_sum
        grad = tl.exp2(log_p * LOG2E) - (o_column == column).to(tl.float32)
        # Not a product: the target's column of an ignored token may hold an overflow.
        grad = tl.where(factor != 0.0, grad * factor, 0.0)
        p_block = p_grad + i_n.to(tl.int64) * stride_grad + o_column
        tl.store(p_block, grad.to(p_grad.dtype.element_ty), mask=in_row(o_column, n_columns))


def take_columns(
    logits: Tensor,  # [N, n_columns]
    bias: Tensor | None,
    targets: Targets,
    state: Tensor,  # [3, N]
    nll: Tensor,  # [N]
    lse: Tensor,  # [2, N]
    first_column: int,
    is_last: bool,
) -> None:
    """Adds a block of columns to `state`; with the last one writes `nll` and `lse`."""
    N, n_columns = logits.shape
    launch(
        _adaptive_head_lse_kernel, (N,),
        logits, logits if bias is None else bias, targets.target, state, nll, *lse,
        first_tokens(targets.sizes), N, sum(targets.sizes), targets.ignore_index,
        first_column, n_columns, logits.stride(0),
        HAS_BIAS=bias is not None, IS_FIRST=first_column == 0, IS_LAST=is_last,
        N_CLUSTERS=len(targets.sizes), **head_options(logits.device),
    )  # fmt: skip


def to_gradient(
    logits: Tensor,  # [n, n_columns]
    grad: Tensor,  # [n, n_columns], written; may be logits
    bias: Tensor | None,
    targets: Targets,
    *,
    first_column: int = 0,
    nll: Tensor | None = None,
    lse: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """Reads `lse` [2, n] and `factor` [n] if given; else rows are whole, and it writes `nll`."""
    n, n_columns = logits.shape
    largest, log_sum = (None, None) if lse is None else lse
    launch(
        _adaptive_head_grad_kernel, (n,),
        logits, grad, logits if bias is None else bias, targets.target,
        *(logits if x is None else x for x in (nll, largest, log_sum, factor)),
        first_tokens(targets.sizes), sum(targets.sizes), targets.ignore_index,
        first_column, n_columns, logits.stride(0), grad.stride(0),
        HAS_BIAS=bias is not None, HAS_LSE=lse is not None, N_CLUSTERS=len(targets.sizes),
        **head_options(logits.device),
    )  # fmt: skip
