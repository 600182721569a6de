"""The ops on meta tensors, and on CPU tensors while torch's default device is another."""

from __future__ import annotations

import pytest
import torch

import txl_kernels
from txl_kernels import resolve


@pytest.fixture
def another_default_device():
    with torch.device("meta"):
        yield


def _calls(device: str, backend: str):
    """Every public op with its result's shape; a backend for those that have several."""

    def normal(*shape):
        return torch.randn(shape, device=device, requires_grad=True)

    q, k, r = normal(2, 2, 4, 8), normal(2, 2, 4, 8), normal(1, 2, 4, 8)
    hidden, head, tails = normal(5, 6), normal(9, 6), [(None, normal(7, 6), None)]
    target = torch.ones(5, dtype=torch.int64, device=device)
    lens = torch.tensor([3, 4], device=device)
    softmax = {"cutoffs": (8,)}
    named = {"backend": backend}
    attention = {"causal": True, "key_lens": lens, "dropout_p": 0.5}
    ops = txl_kernels
    return {
        "rel_attention": (lambda: ops.rel_attention(q, k, k, r, **attention, **named), q.shape),
        "rel_shift": (lambda: ops.rel_shift(q, **named), q.shape),
        "adaptive_nll": (
            lambda: ops.adaptive_nll(hidden, target, head, tails, **softmax, **named),
            (5,),
        ),
        "adaptive_loss": (
            lambda: ops.adaptive_loss(hidden, target, head, tails, **softmax, **named),
            (),
        ),
        "adaptive_embedding": (
            lambda: ops.adaptive_embedding(target, [head], [None], **named),
            (5, 6),
        ),
        "adaptive_log_prob": (
            lambda: ops.adaptive_log_prob(hidden, head, tails, **softmax),
            (5, 15),
        ),
        "adaptive_topk": (lambda: ops.adaptive_topk(hidden, head, tails, 3, **softmax)[0], (5, 3)),
        "adaptive_sample": (lambda: ops.adaptive_sample(hidden, head, tails, **softmax), (5,)),
        "adaptive_sample by mass": (
            lambda: ops.adaptive_sample(hidden, head, tails, **softmax, top_p=0.5),
            (5,),
        ),
    }


EVERY_OP = pytest.mark.parametrize("name", _calls("meta", "auto"))


@EVERY_OP
@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
def test_meta_tensors_give_shapes_forward_and_backward(name, backend, require_backend):
    if backend == "native":
        require_backend("rel_attention", "native")
    call, shape = _calls("meta", backend)[name]
    out = call()
    assert out.device.type == "meta"
    assert out.shape == shape
    if out.requires_grad:
        out.sum().backward()


@pytest.mark.parametrize("device", ["meta", "vulkan"])
def test_autocast_of_a_device_leaves_kinds_without_autocast_alone(device):
    assert resolve("rel_attention", device=device, dtype=torch.float32).backend == "reference"
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(1, 2, 4, 4, device="meta")
        assert txl_kernels.rel_attention(x, x, x, x).dtype == torch.float32


@EVERY_OP
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_another_default_device_changes_nothing(
    name, backend, require_backend, another_default_device
):
    require_backend("rel_attention", backend)
    call, shape = _calls("cpu", backend)[name]
    out = call()
    assert out.device.type == "cpu"
    assert out.shape == shape
    if out.requires_grad:
        out.sum().backward()
