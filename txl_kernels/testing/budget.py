"""The error budget: how far a kernel may be from the float64 reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The oracle has no more digits than a float64 kernel: such a one may differ by 256 roundings.
_FLOAT64_EPS = 2.0**-44


def check_budget(
    name: str,
    actual: Tensor,
    ref64: Tensor,
    ref_dtype: Tensor,
    *,
    dtype: torch.dtype,
    magnitude: float | None = None,
    is_sum: bool = False,
) -> None:
    """Asserts |actual - ref64| ≤ 2·(|ref_dtype - ref64| + eps·magnitude), per tensor.

    |·| is the largest absolute value, or the Frobenius norm where `is_sum`, and the magnitude then
    counts once per element. Infinite elements must agree exactly.

    Args:
        name: what the tensor is, for the message.
        actual: the kernel's result.
        ref64: the reference's in float64, from the same rounded inputs.
        ref_dtype: plain eager PyTorch's in the kernel's dtype, intermediates rounded.
        dtype: the kernel's, which gives eps.
        magnitude: for an output the largest |ref64| (the default); for a gradient the largest
            product of magnitudes that enters it, since it may cancel to 0.
        is_sum: for gradients that are sums over many elements (r, biases, weights).

    Raises:
        AssertionError: over budget, or NaN, or infinite in other places than the oracle.
    """
    assert actual.shape == ref64.shape, f"{name}: shape {actual.shape}, due {ref64.shape}"
    actual, ref_dtype = actual.detach().double(), ref_dtype.detach().double()
    ref64 = ref64.detach()
    finite = ref64.isfinite()
    assert torch.equal(actual[~finite], ref64[~finite]), f"{name}: infinite elements differ"
    actual, ref64, ref_dtype = actual[finite], ref64[finite], ref_dtype[finite]
    if ref64.numel() == 0:
        return
    eps = max(torch.finfo(dtype).eps, _FLOAT64_EPS)
    if magnitude is None:
        magnitude = float(ref64.abs().max())
    error, due = _norm(actual - ref64, is_sum), _norm(ref_dtype - ref64, is_sum)
    slack = eps * magnitude * (math.sqrt(ref64.numel()) if is_sum else 1.0)
    budget = 2.0 * (due + slack)
    assert error <= budget, (
        f"{name}: error {error:.3g} over the budget of {budget:.3g} "
        f"(eager {dtype}: {due:.3g}, eps · magnitude: {slack:.3g})"
    )


def _norm(difference: Tensor, is_sum: bool) -> float:
    return float(difference.norm() if is_sum else difference.abs().max())
