"""The error budget: the largest allowed difference between a kernel and the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# The float64 reference is no more exact than a float64 kernel, which may differ by 256 roundings.
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

    |·| is the largest absolute value. With `is_sum` it is the Frobenius norm, and the magnitude is
    then multiplied by the square root of the number of elements. Infinite elements must be equal.

    Args:
        name: name of the tensor, for the message.
        actual: result of the kernel.
        ref64: result of the reference in float64, from the same rounded inputs.
        ref_dtype: result of plain eager PyTorch in the kernel's dtype, every intermediate rounded.
        dtype: dtype of the kernel, which defines eps.
        magnitude: for an output the largest |ref64| (the default); for a gradient, which may cancel
            to 0, the largest product of magnitudes that it contains.
        is_sum: for gradients that are sums over many elements (r, biases, weights).

    Raises:
        AssertionError: the error exceeds the budget or is NaN, or the infinite elements differ.
    """
    share, reason = _share(
        name, actual, ref64, ref_dtype, dtype=dtype, magnitude=magnitude, is_sum=is_sum
    )
    assert share <= 1, reason


def error_over_budget(
    name: str, actual: Tensor, ref64: Tensor, ref_dtype: Tensor, **options: Any
) -> float:
    """The error as a share of the budget of `check_budget`, which accepts shares of at most 1.

    The share of a NaN is infinite. The arguments are those of `check_budget`.

    Raises:
        AssertionError: the shapes or the infinite elements differ.
    """
    return _share(name, actual, ref64, ref_dtype, **options)[0]


def _share(
    name: str,
    actual: Tensor,
    ref64: Tensor,
    ref_dtype: Tensor,
    *,
    dtype: torch.dtype,
    magnitude: float | None = None,
    is_sum: bool = False,
) -> tuple[float, str]:
    """The error as a share of the budget, and both as text."""
    assert actual.shape == ref64.shape, f"{name}: shape {actual.shape}, expected {ref64.shape}"
    actual, ref_dtype = actual.detach().double(), ref_dtype.detach().double()
    ref64 = ref64.detach()
    finite = ref64.isfinite()
    assert torch.equal(actual[~finite], ref64[~finite]), f"{name}: infinite elements differ"
    actual, ref64, ref_dtype = actual[finite], ref64[finite], ref_dtype[finite]
    if ref64.numel() == 0:
        return 0.0, ""
    eps = max(torch.finfo(dtype).eps, _FLOAT64_EPS)
    if magnitude is None:
        magnitude = float(ref64.abs().max())
    error, eager = _norm(actual - ref64, is_sum), _norm(ref_dtype - ref64, is_sum)
    slack = eps * magnitude * (math.sqrt(ref64.numel()) if is_sum else 1.0)
    budget = 2.0 * (eager + slack)
    terms = f"eager {dtype}: {eager:.3g}, eps · magnitude: {slack:.3g}"
    reason = f"{name}: error {error:.3g} over the budget of {budget:.3g} ({terms})"
    if error <= budget:
        return (error / budget if error else 0.0), reason
    return (error / budget if budget and not math.isnan(error) else math.inf), reason


def _norm(difference: Tensor, is_sum: bool) -> float:
    return float(difference.norm() if is_sum else difference.abs().max())
