"""banded_attention with Triton's kernels for the near keys: they accept the merged out and lse."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import banded_attention

pytestmark = pytest.mark.interpreted


def test_near_keys_in_triton_and_far_keys_in_torch(require_backend):
    require_backend("rel_attention", "triton", needs_grad=True)
    B, H, Hk, T, R, D, Dp = 1, 2, 1, 20, 7, 8, 4
    shapes = {"q": (B, H, T, D), "k": (B, Hk, T, D), "v": (B, Hk, T, D), "r": (1, 1, R, Dp)}
    shapes |= {"r_w_bias": (H, D), "r_r_bias": (H, Dp), "q_pos": (B, H, T, Dp)}
    generator = torch.Generator().manual_seed(0)
    x = {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}
    out, due = (
        banded_attention(**x, pos_scale=0.3, clamp=True, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(out, due)
    dout = torch.randn_like(out)
    grads = (torch.autograd.grad(result, list(x.values()), dout) for result in (out, due))
    for name, actual, expected in zip(x, *grads, strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
