"""The head of the adaptive softmax: products by cuBLAS, one block of logits at a time.

The loss uses blocks of tokens and computes the gradient from their logits: three products. The loss
per token uses blocks of columns with an online log-sum-exp and recomputes the logits in backward:
four products. `docs/mathematics.md` has the costs.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from txl_kernels.backends.reference.adaptive_softmax import Cluster
from txl_kernels.backends.triton.adaptive_products import sum_dtype
from txl_kernels.backends.triton.adaptive_softmax_head_rows import (
    Targets,
    padded,
    take_columns,
    to_gradient,
)

MAX_LOGITS = 2**25
"""Float32 logits in memory at a time; with a 16-bit gradient of each they need 192 MiB.

There are more only if the logits of 256 tokens, or of all tokens for 256 columns, are more.
"""


class _Limit(threading.local):
    """Of this thread: replaces MAX_LOGITS where a self-test with few tokens needs small blocks."""

    logits = MAX_LOGITS


limit = _Limit()

_MIN_TOKENS = 512
"""The fewest tokens of a block. With fewer, adding each block's gradient to the float32 sum of the
weight would cost more than the fourth product of blocks of columns. Not measured on a GPU."""


def in_float16_range(a: Tensor) -> tuple[Tensor, Tensor]:
    """float16 `a` · 2^k and float32 2^-k [rows, 1], for float32 `a` [rows, columns].

    The largest element of a row becomes about 2^15. So rounding to float16 keeps all elements that
    are not negligible in the row's products, for rows of any magnitude.
    """
    largest = torch.linalg.vector_norm(a, torch.inf, dim=1, keepdim=True)
    unit = torch.exp2(torch.frexp(largest).exponent.clamp(min=-100) - 15.0)
    rows, columns = a.shape
    if a.stride(0) == 1 and rows > 1:  # keeps the layout of a transposed matrix
        scaled = a.new_empty(columns, padded(rows), dtype=torch.float16)[:, :rows].mT
    else:
        scaled = a.new_empty(rows, padded(columns), dtype=torch.float16)[:, :columns]
    return torch.div(a, unit, out=scaled), unit


def add_product(a: Tensor, b: Tensor, out: Tensor, adds: bool) -> None:
    """out (+)= a · b with float32 `out`; sums are float32, 16-bit products use tensor cores.

    A float32 `a` with a float16 `b` is a gradient and keeps its range.
    """
    if out.is_meta:  # torch 2.11 fails with `out_dtype`; there is nothing to compute
        return
    if a.dtype == torch.float32 and b.dtype == torch.float16 and a.numel() > 0:
        a, unit = in_float16_range(a)
        product = torch.empty_like(out)
        add_product(a, b, product, adds=False)
        if adds:
            out.addcmul_(product, unit)
        else:
            torch.mul(product, unit, out=out)
        return
    if a.dtype == torch.float32 or a.device.type == "cpu":  # no `out_dtype` there
        a, b = a.float(), b.float()
        if adds:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    elif adds:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a · b, summed in float32 and rounded once, for any setting of torch's reductions."""
    total = out
    if out.dtype != torch.float32:
        total = out.new_empty(out.shape, dtype=torch.float32)
    add_product(a, b, total, adds=False)
    return out if total is out else out.copy_(total)


class _Block:
    """Memory for [rows, columns] logits in float32 and their gradient in its dtype.

    Rows start at multiples of 64 bytes. In a head of 20,003 columns they would not be aligned
    otherwise, and cuBLAS's fast kernels and vector loads need aligned rows.
    """

    def __init__(self, rows: int, columns: int, like: Tensor, with_grad: bool) -> None:
        stride = padded(columns)
        self._logits = like.new_empty(rows, stride, dtype=torch.float32)
        self._logit_grads = self._logits
        if with_grad and sum_dtype(like) != torch.float32:
            self._logit_grads = like.new_empty(rows, stride)

    def logits(self, rows: int, columns: int) -> Tensor:
        return self._logits[:rows, :columns]

    def grad(self, rows: int, columns: int) -> Tensor:
        return self._logit_grads[:rows, :columns]


def block_of_columns(N: int, n_columns: int) -> int:
    """Columns per block, if a block has all tokens."""
    return min(n_columns, max(256, limit.logits // max(N, 1) // 128 * 128))


def block_of_tokens(N: int, n_columns: int) -> int | None:
    """Tokens per block, if a block has whole rows; None if blocks of columns are cheaper."""
    block = limit.logits // n_columns // 128 * 128
    return None if block < _MIN_TOKENS and block < N else max(1, min(N, block))


def head_nll(x: Tensor, head: Cluster, targets: Targets, nll: Tensor, lse: Tensor) -> None:
    """Writes the head's part of the loss and its `lse` [2, N], from projected rows x [N, d_0]."""
    N, V0 = x.shape[0], head.weight.shape[0]
    size = block_of_columns(N, V0)
    block = _Block(N, size, x, with_grad=False)
    state = nll.new_empty(3, N)
    for first in range(0, V0, size):
        n_columns = min(size, V0 - first)
        logits = block.logits(N, n_columns)
        add_product(x, head.weight[first : first + n_columns].mT, logits, adds=False)
        bias = None if head.bias is None else head.bias[first : first + n_columns]
        is_last = first + n_columns == V0
        take_columns(logits, bias, targets, state, nll, lse, first, is_last)


def head_bwd(
    x: Tensor,  # [N, d_0]
    head: Cluster,
    targets: Targets,
    lse: Tensor,  # [2, N]
    factor: Tensor,  # [N]
    dweight: Tensor | None,
    dbias: Tensor | None,
    needs_dx: bool,
) -> Tensor | None:
    """Blocks of columns: writes each part of dweight and dbias; returns dx [N, d_0], float32."""
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
        to_gradient(logits, grad, bias, targets, first_column=first, lse=lse, factor=factor)
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
    """Blocks of tokens: writes the head's part of the loss, and its gradients times `scale`.

    Returns dx [N, d_0] in the dtype in which gradients of x are summed.
    """
    N, V0 = x.shape[0], head.weight.shape[0]
    block = _Block(block_size, V0, x, with_grad=True)
    dx = x.new_empty(x.shape, dtype=sum_dtype(x)) if needs_dx else None
    weight_sum = None if dweight is None else dweight.new_empty(V0, x.shape[1], dtype=torch.float32)
    bias_sum = None if dbias is None else dbias.new_zeros(V0, dtype=torch.float32)
    for first in range(0, N, block_size):
        last = min(first + block_size, N)
        logits, grad = block.logits(last - first, V0), block.grad(last - first, V0)
        add_product(x[first:last], head.weight.mT, logits, adds=False)
        here = Targets(targets.target[first:last], targets.sizes, targets.ignore_index)
        to_gradient(logits, grad, head.bias, here, nll=nll[first:last])
        if bias_sum is not None:
            bias_sum += grad.sum(0, dtype=torch.float32)
        if weight_sum is not None:
            add_product(grad.mT, x[first:last], weight_sum, adds=first > 0)
        if dx is not None:
            piece = x.new_empty(last - first, x.shape[1], dtype=torch.float32)
            add_product(grad, head.weight, piece, adds=False)
            torch.mul(piece, scale, out=dx[first:last])
    for total, out in ((weight_sum, dweight), (bias_sum, dbias)):
        if total is not None and out is not None:
            torch.mul(total, scale, out=out)
    return dx
