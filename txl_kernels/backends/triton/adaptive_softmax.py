"""`torch.ops.txl_triton.adaptive_nll_*` and `adaptive_loss_*`: the head's and the tails' parts.

Sums of float16 gradients are float32 until their factor is known, and so are the gradients that
`adaptive_loss` keeps for backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels._register_adaptive import is_present
from txl_kernels.backends.reference.adaptive_softmax import Cluster
from txl_kernels.backends.triton import adaptive_softmax_head as heads
from txl_kernels.backends.triton.adaptive_buckets import Buckets, sort_by_cluster
from txl_kernels.backends.triton.adaptive_products import multiply_rows, sum_dtype, sum_outer
from txl_kernels.backends.triton.adaptive_softmax_head_rows import Targets
from txl_kernels.backends.triton.adaptive_softmax_tails import Tails, add_tails_nll, project
from txl_kernels.backends.triton.adaptive_softmax_tails_bwd import tails_dx, write_tails_dweight
from txl_kernels.backends.triton.launching import launch


def adaptive_nll_fwd(
    hidden: Tensor,  # [N, d]
    target: Tensor,  # [N]
    clusters: Sequence[Tensor],  # projection, weight, bias of each; empty where absent
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Returns nll [N] and, as `_register_adaptive` describes it, lse [2, 2, N], in float32."""
    with torch.cuda.device_of(hidden):
        call = _Call("adaptive_nll", hidden, target, clusters, ignore_index)
        nll, lse = call.new_losses()
        if call.N > 0:
            heads.head_nll(call.head_x(), call.head, call.targets, nll, lse[0])
            call.add_tails_nll(nll, lse[1])
    return nll, lse


def adaptive_nll_bwd(
    dnll: Tensor,  # [N]
    hidden: Tensor,
    target: Tensor,
    clusters: Sequence[Tensor],
    ignore_index: int,
    lse: Tensor,  # [2, 2, N]
    needs_grad: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of hidden and of the clusters' tensors, empty where not needed."""
    with torch.cuda.device_of(hidden):
        call = _Call("adaptive_nll", hidden, target, clusters, ignore_index)
        grads = _Gradients(hidden, clusters, needs_grad)
        if call.N == 0:
            grads.zero()
        else:
            call.backward(grads, lse, dnll.contiguous())
    dhidden, *dclusters = (
        grad.to(x.dtype) for grad, x in zip(grads.flat(), (hidden, *clusters), strict=True)
    )
    return dhidden, dclusters


def adaptive_loss_fwd(
    hidden: Tensor,
    target: Tensor,
    clusters: Sequence[Tensor],
    ignore_index: int,
    mean: bool,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Returns loss [] and the gradients of hidden and of the clusters' tensors."""
    with torch.cuda.device_of(hidden):
        call = _Call("adaptive_loss", hidden, target, clusters, ignore_index)
        grads = _Gradients(hidden, clusters, needs_grad)
        nll, lse = call.new_losses()
        scale = nll.new_ones(())
        if mean:  # the ignored tokens come after the others, from this position on
            scale = call.buckets.first[-2].clamp(min=1).float().reciprocal()
        if call.N == 0:
            grads.zero()
            nll = nll.new_zeros(1)
        elif grads.any_needed():
            call.loss_and_gradients(grads, nll, lse, scale)
        else:
            heads.head_nll(call.head_x(), call.head, call.targets, nll, lse[0])
            call.add_tails_nll(nll, lse[1])
    return nll.sum() * scale, grads.flat()


def adaptive_loss_bwd(dloss: Tensor, grads: Sequence[Tensor]) -> None:
    """Multiplies the gradients in place by dloss; reads none of them if that is 1."""
    with torch.cuda.device_of(dloss):
        for grad in grads:
            if grad.numel() > 0:
                launch(
                    _adaptive_scale_kernel,
                    (triton.cdiv(grad.numel(), 4096),),
                    grad,
                    dloss,
                    grad.numel(),
                    BLOCK=4096,
                    num_warps=8,
                )


@triton.jit
def _adaptive_scale_kernel(p_grad, p_factor, n, BLOCK: tl.constexpr):
    """Multiplies BLOCK elements in place by one float32 number; reads no element if it is 1."""
    factor = tl.load(p_factor)
    if factor != 1.0:
        o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(p_grad + o_n, mask=o_n < n).to(tl.float32)
        tl.store(p_grad + o_n, (grad * factor).to(p_grad.dtype.element_ty), mask=o_n < n)


class _Gradients:
    """Buffers for the requested gradients of hidden and of every cluster's tensors, else None."""

    def __init__(
        self, hidden: Tensor, clusters: Sequence[Tensor], needs_grad: Sequence[bool]
    ) -> None:
        self._inputs = (hidden, *clusters)
        buffers = [
            torch.empty(x.shape, dtype=sum_dtype(x), device=x.device)
            if needed and is_present(x)
            else None
            for x, needed in zip(self._inputs, needs_grad, strict=True)
        ]
        self._sums = buffers
        self.hidden = buffers[0]
        self.projections, self.weights, self.biases = (buffers[n::3] for n in (1, 2, 3))

    def needs_rows(self, k: int) -> bool:
        """Whether the gradient of cluster k's projected rows is needed."""
        return self.hidden is not None or self.projections[k] is not None

    def any_needed(self) -> bool:
        return any(buffer is not None for buffer in self._sums)

    def zero(self) -> None:
        for buffer in self._sums:
            if buffer is not None:
                buffer.zero_()

    def flat(self) -> list[Tensor]:
        """In the order of the schema, empty if not requested."""
        return [
            x.new_empty(0, dtype=sum_dtype(x)) if buffer is None else buffer
            for x, buffer in zip(self._inputs, self._sums, strict=True)
        ]


class _Call:
    """One call's arguments in the form that the kernels read, and its tokens by cluster."""

    def __init__(
        self,
        op: str,
        hidden: Tensor,
        target: Tensor,
        clusters: Sequence[Tensor],
        ignore_index: int,
    ) -> None:
        def given(x: Tensor) -> Tensor | None:
            return x.contiguous() if is_present(x) else None

        self.head, *self.tails = (
            Cluster(given(projection), weight.contiguous(), given(bias))
            for projection, weight, bias in zip(
                clusters[::3], clusters[1::3], clusters[2::3], strict=True
            )
        )
        self.hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        self.N = hidden.shape[0]
        c0 = self.head.weight.shape[0] - len(self.tails)
        sizes = (c0, *(tail.weight.shape[0] for tail in self.tails))
        self.targets = Targets(target.contiguous(), sizes, ignore_index)
        self.buckets: Buckets = sort_by_cluster(
            op, "target", self.targets.target, sizes, ignore_index
        )

    def clear_ignored_rows(self) -> None:
        """Replaces hidden by a copy with 0 in the rows of ignored tokens, which may hold NaN.

        The gradients of the head's weights are products with all rows, and 0 · NaN is NaN.
        """
        ignored = self.targets.target == self.targets.ignore_index
        self.hidden = self.hidden.masked_fill(ignored[:, None], 0.0)

    def new_losses(self) -> tuple[Tensor, Tensor]:
        """nll [N] and lse [2, 2, N]; lse is 0 for tokens without a tail."""
        nll = self.hidden.new_empty(self.N, dtype=torch.float32)
        return nll, nll.new_zeros(2, 2, self.N)

    def head_x(self) -> Tensor:
        """The head's projected rows [N, d_0], in hidden's dtype."""
        if self.head.projection is None:
            return self.hidden
        x = self.hidden.new_empty(self.N, self.head.weight.shape[1])
        return heads.multiply(self.hidden, self.head.projection.mT, out=x)

    def add_tails_nll(self, nll: Tensor, lse: Tensor) -> Tails | None:
        if not self.tails:
            return None
        tails = project(self.hidden, self.tails, self.buckets)
        add_tails_nll(nll, lse, tails, self.buckets)
        return tails

    def backward(self, grads: _Gradients, lse: Tensor, dnll: Tensor) -> None:
        """Writes the gradients of Σ dnll · nll."""
        self.clear_ignored_rows()
        x = self.head_x()
        dx = heads.head_bwd(
            x, self.head, self.targets, lse[0], dnll,
            grads.weights[0], grads.biases[0], grads.needs_rows(0),
        )  # fmt: skip
        self._head_rows_bwd(grads, dx)
        if self.tails:
            tails = project(self.hidden, self.tails, self.buckets)
            self._tails_bwd(grads, tails, lse[1], dnll)

    def loss_and_gradients(
        self, grads: _Gradients, nll: Tensor, lse: Tensor, scale: Tensor
    ) -> None:
        """Writes nll, lse, and the gradients of `scale` [] times the sum of nll."""
        self.clear_ignored_rows()
        x = self.head_x()
        size = heads.block_of_tokens(self.N, self.head.weight.shape[0])
        requested = grads.weights[0], grads.biases[0], grads.needs_rows(0)
        if size is None:
            heads.head_nll(x, self.head, self.targets, nll, lse[0])
            factor = scale.expand(self.N).contiguous()
            dx = heads.head_bwd(x, self.head, self.targets, lse[0], factor, *requested)
        else:
            dx = heads.head_loss(x, self.head, self.targets, nll, scale, size, *requested)
        self._head_rows_bwd(grads, dx)
        tails = self.add_tails_nll(nll, lse[1])
        if tails is not None:
            self._tails_bwd(grads, tails, lse[1], scale)

    def _head_rows_bwd(self, grads: _Gradients, dx: Tensor | None) -> None:
        """Writes the gradients of hidden and projection from that of the head's projected rows."""
        if dx is None:
            return
        dx = dx.to(sum_dtype(self.hidden))
        projection = self.head.projection
        if grads.hidden is not None:
            if projection is None:
                grads.hidden.copy_(dx)
            else:
                heads.multiply(dx, projection, out=grads.hidden)
        if grads.projections[0] is not None:
            heads.multiply(dx.mT, self.hidden, out=grads.projections[0])

    def _tails_bwd(self, grads: _Gradients, tails: Tails, lse: Tensor, factor: Tensor) -> None:
        """Adds the tails' part to hidden's gradient, which holds the head's part already.

        Writes the gradients of the tails' weights, biases and projections.
        """
        write_tails_dweight(tails, self.buckets, lse, factor, grads.weights[1:], grads.biases[1:])
        n_tails = len(self.tails)
        if not any(grads.needs_rows(k) for k in range(1, n_tails + 1)):
            return
        dx = tails_dx(tails, self.buckets, lse, factor)
        if grads.hidden is not None:
            multiply_rows(
                [dx] * n_tails,
                [tail.projection for tail in self.tails],
                grads.hidden,
                self.buckets,
                first_cluster=1,
                out_row=self.buckets.order,
                transposed=True,
                widths=tails.widths,
                adds=True,
            )
        sum_outer(
            [dx] * n_tails,
            [self.hidden] * n_tails,
            grads.projections[1:],
            self.buckets,
            first_cluster=1,
            right_row=self.buckets.order,
        )
