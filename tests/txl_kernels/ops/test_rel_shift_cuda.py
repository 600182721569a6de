"""rel_shift's native kernel on a GPU: bit by bit what the reference gives, both directions."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_shift

SHAPES = [  # leading sizes, Tq, R, n_keys, offset
    ((2, 3), 5, 9, None, None),
    ((2,), 7, 3, 20, 4),
    ((1, 2, 3), 17, 401, 230, None),
    ((3,), 4, 6, 5, -2),
    ((3,), 4, 60, 50, 2**40),
    ((0,), 4, 6, None, None),
    ((2,), 3, 5, 0, None),
    ((8, 4), 256, 1000, 513, None),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize(("lead", "Tq", "R", "n_keys", "offset"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_reference_bit_by_bit(lead, Tq, R, n_keys, offset, dtype, require_backend):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    require_backend("rel_shift", "native", device="cuda", dtype=dtype, needs_grad=True)
    # One element into an allocation: rows begin at every alignment.
    memory = torch.randn(1 + torch.Size(lead).numel() * Tq * R, device="cuda").to(dtype)
    x = memory[1:].view(*lead, Tq, R).requires_grad_()
    results = []
    for backend in ("native", "reference"):
        out = rel_shift(x, n_keys=n_keys, offset=offset, backend=backend)
        dout = torch.arange(out.numel(), device="cuda").remainder(251).to(dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, x, dout)))
    for native, due in zip(*results, strict=True):
        assert torch.equal(native, due)
