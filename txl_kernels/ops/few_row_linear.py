"""`few_row_linear`: a linear layer of a decoding step, whose time is that of reading the weight."""

from __future__ import annotations

import math
from typing import Any
from typing import cast as cast_type

import torch
from torch import Tensor

from txl_kernels._namespaces import NATIVE
from txl_kernels.backends import choose, operators
from txl_kernels.backends.reference import few_row_linear as reference
from txl_kernels.ops.autocast import autocast_dtype, cast, outside_autocast
from txl_kernels.ops.checks import FLOATING, check_dtype, check_given, check_shape, check_tensor
from txl_kernels.ops.checks import needs_grad as any_needs_grad
from txl_kernels.torch_private import AutoDispatchBelowAutograd, is_changed

OP = "few_row_linear"
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_MOST_KEYS = 1024
checked_calls: set[tuple[Any, ...]] = set()  # keys of calls that native runs


def few_row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x · weightᵀ + bias for at most 16 rows of x: the weight is read once, in place.

        out[..., n] = weight_scale[n] · Σ_k x[..., k] · weight[n, k] + bias[n]

    The native kernels run on the CPU, without gradients and for at most 16 rows; with "auto", all
    other calls run on the reference, which is `F.linear`.

    Args:
        x: [..., K]; float32, bfloat16, float16 or float64; any strides.
        weight: [N, K] in x's dtype, for float32 x also in bfloat16 or float16; or int8 with
            `weight_scale`. A weight whose columns are not adjacent in memory is copied.
        bias: [N], float32 or the dtype of x or of the weight.
        weight_scale: [N], float32 or x's dtype; an int8 weight requires it, others exclude it.
        backend: "auto", "reference" or "native"; a named backend runs the call or raises.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype or device.
        BackendUnavailableError: the named backend is missing, or does not run this call.

    Precision: native sums in float32 (float64 for float64) and rounds once. The result of a row
    depends neither on the other rows nor on the number of threads. The reference computes in x's
    dtype; for int8 weights in float32 (float64 for float64).
    """
    key = _key(x, weight, bias, weight_scale, backend)
    if key in checked_calls:
        # Skips the operator's autograd kernel, which is Python.
        with AutoDispatchBelowAutograd():
            out = NATIVE.few_row_linear_fwd.default(x, weight, bias, weight_scale)
            return cast_type(Tensor, out)
    x, weight, bias = _checked_arguments(x, weight, bias, weight_scale)
    tensors = (x, weight, bias, weight_scale)
    chosen = choose(
        OP,
        x,
        backend=backend,
        dtype=x.dtype,
        Tq=math.prod(x.shape[:-1]),
        needs_grad=any_needs_grad(*tensors),
        uses=() if all(map(_is_strided, tensors)) else ("sparse tensors",),
    )
    with outside_autocast(x.device):
        if chosen == "reference":
            return reference.few_row_linear(x, weight, bias, weight_scale)
        if key is not None:
            if len(checked_calls) >= _MOST_KEYS:
                checked_calls.clear()
            checked_calls.add(key)
        out = operators(chosen).few_row_linear_fwd(x, weight, bias, weight_scale)
        return cast_type(Tensor, out)


def _is_strided(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.layout == torch.strided


def _key(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None, backend: str
) -> tuple[Any, ...] | None:
    """Equal for calls that need the same checks and run on the same backend.

    None for traced, transformed or autocast calls, calls outside the CPU, those with sparse tensors
    and those that may need a gradient: these are checked every time.
    """
    if torch.compiler.is_compiling() or is_changed():
        return None
    may_need_grad = torch.is_grad_enabled()
    parts: list[Any] = [backend]
    for tensor in (x, weight, bias, weight_scale):
        if tensor is None:
            parts.append(None)
            continue
        is_plain = type(tensor) in _TENSORS and tensor.is_cpu and _is_strided(tensor)
        if not is_plain or (may_need_grad and tensor.requires_grad):
            return None
        parts += (tensor.shape, tensor.dtype)
    return tuple(parts)


def _checked_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias, under autocast in its dtype."""
    check_tensor(OP, "x", x)
    check_tensor(OP, "weight", weight)
    lower = autocast_dtype(x.device)
    x, weight, bias = cast(x, lower), cast(weight, lower), cast(bias, lower)
    check_dtype(OP, "x", x, FLOATING)
    if x.ndim < 1:
        raise ValueError(f"{OP}: x must have shape [..., K], got []")
    if weight_scale is not None:
        dtypes: tuple[torch.dtype, ...] = (torch.int8,)
    elif x.dtype == torch.float32:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
    else:
        dtypes = (x.dtype,)
    check_given(OP, {"weight": weight}, dtypes, x.device)
    check_shape(OP, "weight", weight, ("N", x.shape[-1]))
    per_output = {"bias": bias, "weight_scale": weight_scale}
    allowed = (x.dtype, torch.float32, *(dtype for dtype in dtypes if dtype.is_floating_point))
    check_given(OP, per_output, allowed, x.device)
    for name, values in per_output.items():
        if values is not None:
            check_shape(OP, name, values, (weight.shape[0],))
    return x, weight, bias
