"""`rel_shift`: the relative shift alone, for models that build their scores themselves."""

from __future__ import annotations

from torch import Tensor

from txl_kernels.backends import choose, operators
from txl_kernels.backends.reference import rel_shift as reference
from txl_kernels.ops.checks import (
    FLOATING,
    check_dtype,
    check_int,
    check_tensor,
    fixed_if_traced,
    needs_grad,
)

OP = "rel_shift"


def rel_shift(
    x: Tensor, *, n_keys: int | None = None, offset: int | None = None, backend: str = "auto"
) -> Tensor:
    """Moves position scores from rows of r to keys: out[..., i, j] = x[..., i, j - i + offset].

    Args:
        x: [..., Tq, R]; float32, bfloat16, float16 or float64; any strides.
        n_keys: columns of the result, default R.
        offset: column of x that is read where j = i, default Tq - 1; any int64.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        [..., Tq, n_keys], x's dtype; 0 where x has no such column.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, range or type.
        BackendUnavailableError: the named backend is not available.

    Precision: values are copied; the gradient sums nothing, each element is read at most once.

    Source: Dai et al., "Transformer-XL", ACL 2019, appendix B.
    """
    check_tensor(OP, "x", x)
    check_dtype(OP, "x", x, FLOATING)
    if x.ndim < 2 or x.shape[-1] < 1:
        raise ValueError(f"{OP}: x must have shape [..., Tq, R] with R ≥ 1, got {list(x.shape)}")
    Tq, R = x.shape[-2:]
    n_keys = check_int(OP, "n_keys", R if n_keys is None else n_keys, at_least=0)
    offset = check_int(OP, "offset", Tq - 1 if offset is None else offset)
    chosen = choose(
        OP,
        x,
        arguments=lambda: (x, n_keys, offset),
        backend=backend,
        dtype=x.dtype,
        Tq=Tq,
        needs_grad=needs_grad(x),
    )
    if chosen == "reference":
        return reference.rel_shift(x, n_keys, offset)
    n_keys, offset = fixed_if_traced(n_keys), fixed_if_traced(offset)
    shifted: Tensor = operators(chosen).rel_shift_fwd(x, n_keys, offset)
    return shifted
