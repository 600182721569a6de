"""The head of the adaptive softmax: products by cuBLAS, a block of logits at a time.

The loss goes by blocks of tokens and forms the gradient from the logits it holds: three products.
The loss per token goes by blocks of columns with an online log-sum-exp and computes the logits
again in backward: four. `docs/mathematics.md` has the costs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.reference.adaptive_softmax import Cluster
from txl_kernels.backends.triton.adaptive_buckets import cluster_of, first_tokens
from txl_kernels.backends.triton.adaptive_configs import head_options

LOG2E = tl.constexpr(1.4426950408889634)
ROW_ALIGNMENT = tl.constexpr(32)

MAX_LOGITS = 2**25
"""Logits held at a time, in float32, beside a 16-bit gradient of each: 192 MiB.

More only where 256 tokens' or all tokens' for 256 columns are more.
"""

_MIN_TOKENS = 512
"""With fewer tokens to a block, adding each block's gradient to the weight's float32 sum takes
longer than a fourth product and reading the logits again would: by arithmetic, from 430 tokens down
at width 1,024, with 4 TB/s and 750 TFLOP/s."""


class Targets(NamedTuple):
    """What says each token's column of the head."""

    target: Tensor  # [N] int64
    sizes: tuple[int, ...]  # tokens of the head and of each tail
    ignore_index: int


@triton.jit
def _head_column(p_target, i_n, firsts, V, ignore_index, N_CLUSTERS: tl.constexpr):
    """Token i_n's column: its own, or its tail's behind the head's tokens; -1 where ignored."""
    token = tl.load(p_target + i_n)
    cluster, column = cluster_of(token, firsts, V, ignore_index, N_CLUSTERS)
    if N_CLUSTERS > 1:
        c0 = firsts[1]
        column = tl.where(cluster > 0, c0 + cluster - 1, column).to(tl.int32)
    return tl.where(cluster == N_CLUSTERS, -1, column)


@triton.jit
def in_row(o_column, n_columns):
    """Where a row of a `_Block` has room: whole vectors, also behind an odd number of columns."""
    return o_column < (n_columns + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT


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
    """Takes one row's n_columns logits into (largest, Σ exp(logit - largest), the target's)."""
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
    p_lse,  # [N], likewise
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
    """Takes a block of columns into one token's online log-sum-exp; writes the loss at the last.

    One program per token, the columns in order, float32 sums: deterministic. The loss is the
    head's part, 0 where the target is ignored.
    """
    i_n = tl.program_id(0)
    column = _head_column(p_target, i_n, firsts, V, ignore_index, N_CLUSTERS)
    largest = float("-inf")
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
        lse = largest + tl.log(total)
        tl.store(p_lse + i_n, lse)
        tl.store(p_nll + i_n, tl.where(column >= 0, lse - at_target, 0.0))
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
    p_lse,  # [n], read if HAS_LSE
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

    One program per token. Without HAS_LSE the row is whole: it is read twice, the second time from
    cache, and the head's part of the loss is written on the way; the factor is 1. In place where
    p_grad is p_logits: each element is read before it is written, by the same thread. Sums are
    float32 in a fixed order: deterministic.
    """
    i_n = tl.program_id(0)
    column = _head_column(p_target, i_n, firsts, V, ignore_index, N_CLUSTERS)
    counts = column >= 0
    column -= first_column
    p_row = p_logits + i_n.to(tl.int64) * stride_logits
    largest = float("-inf")
    total = 0.0
    at_target = 0.0
    factor = 1.0
    if HAS_LSE:
        lse = tl.load(p_lse + i_n)
        factor = tl.load(p_factor + i_n)
    else:
        largest, total, at_target = _row_lse(
            p_row, p_bias, column, n_columns, largest, total, at_target, HAS_BIAS, BLOCK_V
        )
        lse = largest + tl.log(total)
        tl.store(p_nll + i_n, tl.where(counts, lse - at_target, 0.0))
    factor = tl.where(counts, factor, 0.0)
    for start in range(0, n_columns, BLOCK_V):
        o_column = start + tl.arange(0, BLOCK_V)
        logits = _load_logits(p_row, p_bias, o_column, n_columns, HAS_BIAS)
        grad = tl.exp2((logits - lse) * LOG2E) - (o_column == column).to(tl.float32)
        # Not a product: the target's column of an ignored token may hold an overflow.
        grad = tl.where(factor != 0.0, grad * factor, 0.0)
        p_block = p_grad + i_n.to(tl.int64) * stride_grad + o_column
        tl.store(p_block, grad.to(p_grad.dtype.element_ty), mask=in_row(o_column, n_columns))


def add_product(a: Tensor, b: Tensor, out: Tensor, adds: bool) -> None:
    """out (+)= a · b with float32 `out`; sums are float32, 16-bit inputs go to the tensor cores."""
    if a.is_cuda and a.dtype != torch.float32:
        if adds:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif adds:
        out.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=out)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a · b, summed in float32 and rounded once, whatever torch lets cuBLAS reduce in."""
    total = out
    if out.dtype != torch.float32:
        total = out.new_empty(out.shape, dtype=torch.float32)
    add_product(a, b, total, adds=False)
    return out if total is out else out.copy_(total)


class _Block:
    """Room for [rows, columns] logits in float32 and their gradient in the inputs' dtype.

    Rows start 64 bytes apart or a multiple of that: a head of 20,003 columns would else have cuBLAS
    read and write rows that are not aligned, which its fast kernels do not take.
    """

    def __init__(self, rows: int, columns: int, like: Tensor, with_grad: bool) -> None:
        stride = triton.cdiv(columns, ROW_ALIGNMENT.value) * ROW_ALIGNMENT.value
        self._logits = like.new_empty(rows, stride, dtype=torch.float32)
        self._grad = self._logits
        if with_grad and like.dtype != torch.float32:
            self._grad = like.new_empty(rows, stride)

    def logits(self, rows: int, columns: int) -> Tensor:
        return self._logits[:rows, :columns]

    def grad(self, rows: int, columns: int) -> Tensor:
        return self._grad[:rows, :columns]


def _launch_head_grad(
    logits: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    targets: Targets,
    *,
    first_column: int = 0,
    nll: Tensor | None = None,
    lse: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """With `lse` and `factor` they are used, else `nll` is written."""
    n, n_columns = logits.shape
    _adaptive_head_grad_kernel[(n,)](
        logits, grad, logits if bias is None else bias, targets.target,
        targets.target if nll is None else nll,
        targets.target if lse is None else lse,
        targets.target if factor is None else factor,
        first_tokens(targets.sizes), sum(targets.sizes), targets.ignore_index,
        first_column, n_columns, logits.stride(0), grad.stride(0),
        HAS_BIAS=bias is not None, HAS_LSE=lse is not None, N_CLUSTERS=len(targets.sizes),
        **head_options(logits.device),
    )  # fmt: skip


def block_of_columns(N: int, n_columns: int) -> int:
    """Columns to a block of all tokens' logits."""
    return min(n_columns, max(256, MAX_LOGITS // max(N, 1) // 128 * 128))


def block_of_tokens(N: int, n_columns: int) -> int | None:
    """Tokens to a block of whole rows, or None where going by columns is cheaper."""
    block = MAX_LOGITS // n_columns // 128 * 128
    return None if block < _MIN_TOKENS and block < N else max(1, min(N, block))


def head_nll(x: Tensor, head: Cluster, targets: Targets, nll: Tensor, lse: Tensor) -> None:
    """Writes the head's part of the loss, and its log-sum-exp, of projected rows x [N, d_0]."""
    N, V0 = x.shape[0], head.weight.shape[0]
    size = block_of_columns(N, V0)
    block = _Block(N, size, x, with_grad=False)
    state = nll.new_empty(3, N)
    for first in range(0, V0, size):
        n_columns = min(size, V0 - first)
        logits = block.logits(N, n_columns)
        add_product(x, head.weight[first : first + n_columns].mT, logits, adds=False)
        bias = None if head.bias is None else head.bias[first : first + n_columns]
        _adaptive_head_lse_kernel[(N,)](
            logits, logits if bias is None else bias, targets.target, state, nll, lse,
            first_tokens(targets.sizes), N, sum(targets.sizes), targets.ignore_index,
            first, n_columns, logits.stride(0),
            HAS_BIAS=bias is not None, IS_FIRST=first == 0, IS_LAST=first + n_columns == V0,
            N_CLUSTERS=len(targets.sizes), **head_options(logits.device),
        )  # fmt: skip


def head_bwd(
    x: Tensor,  # [N, d_0]
    head: Cluster,
    targets: Targets,
    lse: Tensor,  # [N]
    factor: Tensor,  # [N]
    dweight: Tensor | None,
    dbias: Tensor | None,
    needs_dx: bool,
) -> Tensor | None:
    """By columns: writes dweight and dbias, each piece once; returns dx [N, d_0] in float32."""
    N, V0 = x.shape[0], head.weight.shape[0]
    size = block_of_columns(N, V0)
    block = _Block(N, size, x, with_grad=True)
    dx = x.new_empty(x.shape, dtype=torch.float32) if needs_dx else None
    for first in range(0, V0, size):
        last = min(first + size, V0)
        weight = head.weight[first:last]
        logits, grad = block.logits(N, last - first), block.grad(N, last - first)
        add_product(x, weight.mT, logits, adds=False)
        bias = None if head.bias is None else head.bias[first:last]
        _launch_head_grad(logits, grad, bias, targets, first_column=first, lse=lse, factor=factor)
        if dbias is not None:
            dbias[first:last] = grad.sum(0, dtype=torch.float32)
        if dweight is not None:
            multiply(grad.mT, x, out=dweight[first:last])
        if dx is not None:
            add_product(grad, weight, dx, adds=first > 0)
    return dx


def head_loss(
    x: Tensor,  # [N, d_0]
    head: Cluster,
    targets: Targets,
    nll: Tensor,
    scale: Tensor,  # []
    block_size: int,
    dweight: Tensor | None,
    dbias: Tensor | None,
    needs_dx: bool,
) -> Tensor | None:
    """By tokens: writes the head's part of the loss, and its gradients times `scale`.

    Returns dx [N, d_0] in x's dtype.
    """
    N, V0 = x.shape[0], head.weight.shape[0]
    block = _Block(block_size, V0, x, with_grad=True)
    dx = torch.empty_like(x) if needs_dx else None
    sums = {
        "weight": None
        if dweight is None
        else dweight.new_empty(dweight.shape, dtype=torch.float32),
        "bias": None if dbias is None else dbias.new_zeros(dbias.shape, dtype=torch.float32),
    }
    for first in range(0, N, block_size):
        last = min(first + block_size, N)
        logits, grad = block.logits(last - first, V0), block.grad(last - first, V0)
        add_product(x[first:last], head.weight.mT, logits, adds=False)
        here = Targets(targets.target[first:last], targets.sizes, targets.ignore_index)
        _launch_head_grad(logits, grad, head.bias, here, nll=nll[first:last])
        if sums["bias"] is not None:
            sums["bias"] += grad.sum(0, dtype=torch.float32)
        if sums["weight"] is not None:
            add_product(grad.mT, x[first:last], sums["weight"], adds=first > 0)
        if dx is not None:
            piece = x.new_empty(last - first, x.shape[1], dtype=torch.float32)
            add_product(grad, head.weight, piece, adds=False)
            torch.mul(piece, scale, out=dx[first:last])
    for total, out in ((sums["weight"], dweight), (sums["bias"], dbias)):
        if total is not None and out is not None:
            torch.mul(total, scale, out=out)
    return dx
