"""The host code of the adaptive Triton ops only launches kernels; it never waits for a result.

The calls run on tensors of the device "meta", which have no elements to read, and their launches
are recorded instead of run.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from txl_kernels.backends import triton as package

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or package.interprets(),
    reason="needs Triton; a process interprets or compiles",
)

N, D, SIZES = 8192, 1024, (20_000, 20_000, 160_000, 67_735)
WIDTHS = (1024, 256, 64, 16)
WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item", "is_nonzero")


class _NoWaiting(TorchDispatchMode):
    """Refuses operators that make the host wait for the device, such as copies to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        assert not any(name.startswith(word) for word in WAITS), name
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert not isinstance(x, torch.Tensor) or x.device.type == "meta", name
        return out


def _meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def _clusters(sizes=SIZES, widths=WIDTHS):
    n_tails = len(sizes) - 1
    return [
        x
        for k, (size, width) in enumerate(zip(sizes, widths, strict=True))
        for x in (
            _meta(width, D),
            _meta(size + (0 if k else n_tails), width),
            _meta(size + (0 if k else n_tails), dtype=torch.float32),
        )
    ]


def _nll(clusters):
    from txl_kernels.backends.triton import adaptive_softmax as ops

    hidden, target = _meta(N, D), _meta(N, dtype=torch.int64)
    needed = [True] * (1 + len(clusters))
    nll, lse = ops.adaptive_nll_fwd(hidden, target, clusters, -100)
    ops.adaptive_nll_bwd(torch.empty_like(nll), hidden, target, clusters, -100, lse, needed)


def _loss(clusters):
    from txl_kernels.backends.triton import adaptive_softmax as ops

    hidden, target = _meta(N, D), _meta(N, dtype=torch.int64)
    needed = [True] * (1 + len(clusters))
    loss, grads = ops.adaptive_loss_fwd(hidden, target, clusters, -100, True, needed)
    ops.adaptive_loss_bwd(torch.empty_like(loss), grads)


def _embedding(clusters):
    from txl_kernels.backends.triton import adaptive_embedding as ops

    tokens = _meta(N, dtype=torch.int64)
    tables = [_meta(*shape) for shape in zip(SIZES, WIDTHS, strict=True)]
    projections = [_meta(D, width) for width in WIDTHS]
    out = ops.adaptive_embedding_fwd(tokens, tables, projections, 2.0, False)
    needed = [True] * 8
    ops.adaptive_embedding_bwd(out, tokens, tables, projections, 2.0, True, needed)


def _launched(call, clusters=None):
    from tools.gates.shipped import recording

    with recording(90) as launches, _NoWaiting():
        call(_clusters() if clusters is None else clusters)
    return launches


@pytest.mark.parametrize("call", [_nll, _loss, _embedding], ids=["nll", "loss", "embedding"])
def test_the_host_reads_nothing_from_the_device(call):
    assert _launched(call)


def test_all_tails_go_in_one_launch_each_way():
    names = [launch.kernel.__name__ for launch in _launched(_nll)]
    for kernel in ("tails_fwd", "tails_join", "tails_dx", "tails_dx_join", "tails_dweight"):
        assert names.count(f"_adaptive_{kernel}_kernel") == 1
    # The number of launches does not depend on the number of tails.
    fewer = [launch.kernel.__name__ for launch in _launched(_nll, _clusters(SIZES[:2], WIDTHS[:2]))]
    assert sorted(names) == sorted(fewer)


def test_the_loss_holds_one_block_of_logits():
    from tools.gates.shipped import recording
    from txl_kernels.backends.triton import adaptive_softmax_head as heads

    class Largest(TorchDispatchMode):
        """Records the size of the largest float32 matrix, except the gradient of the weight."""

        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            matrix = isinstance(out, torch.Tensor) and out.dim() == 2
            if matrix and out.dtype == torch.float32 and out.shape != (20_003, D):
                self.found = max(self.found, out.numel())
            return out

    with recording(90), Largest() as largest:
        _loss(_clusters())
    assert 0 < largest.found <= 1.01 * heads.MAX_LOGITS
