"""The choice of an implementation: `resolve` returns a backend, or the reason why none runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from txl_kernels import _flop_formulas
from txl_kernels._namespaces import NATIVE, REGISTERED, TRITON
from txl_kernels._register import register
from txl_kernels.backends import cuda_device, native, triton, verification
from txl_kernels.backends.fallback import MANY_BYTES, warn_of_fallback
from txl_kernels.backends.head_size import MAX_HEAD_SIZE
from txl_kernels.errors import BackendUnavailableError
from txl_kernels.torch_private import constant_in_traces, has_kernel
from txl_kernels.transforms import is_exporting_onnx, is_jit_tracing, kernel_refusal

BACKENDS = ("reference", "native", "triton")
OPS = (
    "rel_attention",
    "rel_shift",
    "adaptive_loss",
    "adaptive_nll",
    "adaptive_log_prob",
    "adaptive_topk",
    "adaptive_sample",
    "adaptive_embedding",
    "few_row_linear",
)
# Public functions without kernels of their own, and what computes them.
COMPOSED = {
    "merge_attention": "plain PyTorch",
    "with_sink": "plain PyTorch",
    "packed_ranges": "plain PyTorch",
    "banded_attention": "rel_attention and torch's flash attention",
}
FEW_ROWS = 16  # the most rows of x in a call of `few_row_linear`'s kernels
_AUTO = {"cpu": ("native",), "cuda": ("native", "triton")}  # then the reference

_FLOAT_TO_16_BIT = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT = (*_FLOAT_TO_16_BIT, torch.float64)
_DENSE_ARGUMENTS = ("bias", "dead_rows='uniform'")


class Serves(NamedTuple):
    """The calls of one op that one backend supports; None: no limit."""

    dtypes: Collection[torch.dtype]
    head_size: int | None = None  # the largest
    Tq: int | None = None  # the most queries or rows
    gradients: bool = True
    lacks: Collection[str] = ()  # unsupported arguments, in the words of `resolve`'s `uses`


# (backend, op) or, where devices differ, (backend, op, device type), which has precedence.
# The reference supports every call and is not listed.
_SERVES: dict[tuple[str, ...], Serves] = {
    ("native", "rel_attention"): Serves(_FLOAT, head_size=MAX_HEAD_SIZE, lacks=_DENSE_ARGUMENTS),
    ("native", "rel_attention", "cuda"): Serves(
        _FLOAT_TO_16_BIT,
        head_size=MAX_HEAD_SIZE,
        Tq=16,
        gradients=False,
        lacks=(*_DENSE_ARGUMENTS, "dropout_p"),
    ),
    ("native", "rel_shift"): Serves(_FLOAT),
    ("native", "adaptive_loss"): Serves(_FLOAT),
    ("native", "adaptive_nll"): Serves(_FLOAT),
    ("native", "adaptive_embedding"): Serves(_FLOAT),
    ("native", "few_row_linear"): Serves(
        _FLOAT, Tq=FEW_ROWS, gradients=False, lacks=("sparse tensors",)
    ),
    ("triton", "rel_attention"): Serves(
        _FLOAT_TO_16_BIT, head_size=MAX_HEAD_SIZE, lacks=_DENSE_ARGUMENTS
    ),
    ("triton", "rel_shift"): Serves(_FLOAT),
    ("triton", "adaptive_loss"): Serves(_FLOAT_TO_16_BIT),
    ("triton", "adaptive_nll"): Serves(_FLOAT_TO_16_BIT),
    ("triton", "adaptive_embedding"): Serves(_FLOAT_TO_16_BIT),
}

for _operators in REGISTERED:
    register(_operators)
_flop_formulas.register(*REGISTERED)
native.register_kernels()
triton.register_kernels()


class Resolution(NamedTuple):
    """The backend that runs a call, and one sentence where it is not the preferred one.

    `backend` is None where no backend runs the call, and `reason` then says why. Where "auto"
    chooses the reference, `reason` says why the preferred backends do not run the call.
    """

    backend: str | None
    reason: str | None


def resolve(
    op: str,
    *,
    backend: str = "auto",
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    Tq: int = 1,
    D: int = 64,
    Dv: int | None = None,
    Dp: int | None = None,
    needs_grad: bool = False,
    uses: Collection[str] = (),
) -> Resolution:
    """Returns the backend that runs a call, or the reason why none does. Only "auto" chooses.

    The ops, `transformer-xl doctor` and the skip reasons of tests all call this function.

    Args:
        op: name of a public op, such as "rel_attention".
        backend: "auto", "reference", "native" or "triton".
        device, dtype: of the tensors.
        Tq: queries (for the adaptive ops: tokens; for `few_row_linear`: rows of x).
        D, Dv, Dp: head sizes of keys, of values and of positions (None: D); for `rel_attention`
            only.
        needs_grad: whether a backward pass will follow.
        uses: what this call uses and not every backend supports: "bias", "dead_rows='uniform'",
            "dropout_p"; for `few_row_linear` "sparse tensors".

    Returns:
        The backend and the reason: with "auto", why the answer is the reference; with a named
        backend, why it does not run the call (`backend` is then None).

    Raises:
        ValueError: no such op or backend.
    """
    if op not in OPS:
        raise ValueError(f"resolve: op must be one of {', '.join(OPS)}; got {op!r}")
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"{op}: backend must be one of {names}; got {backend!r}")
    call = (torch.device(device).type, dtype, Tq, max(D, Dv or D, Dp or D), needs_grad, uses)
    return _resolve(op, backend, {}, *call)


def _resolve(
    op: str,
    backend: str,
    failures: Mapping[str, str],
    device_type: str,
    dtype: torch.dtype,
    Tq: int,
    head_size: int,
    needs_grad: bool,
    uses: Collection[str],
) -> Resolution:
    """`resolve` without the backends in `failures`, {backend: why it is not used}."""
    if backend == "auto" and is_jit_tracing():
        return Resolution("reference", "torch.jit.trace would make constants of a kernel's lengths")
    reasons = []
    for name in _AUTO.get(device_type, ()) if backend == "auto" else (backend,):
        reason = failures.get(name) or _refusal(
            name, op, device_type, dtype, Tq, head_size, needs_grad, uses
        )
        if reason is None and name != "reference" and is_exporting_onnx():
            reason = f'ONNX has no {name} kernel: export with backend="reference"'
            return Resolution(None, reason)
        if reason is None:
            return Resolution(name, None)
        reasons.append(reason)
    if backend != "auto":
        return Resolution(None, reasons[0])
    no_kernels = f"the kernels run on {' and '.join(_AUTO)} devices, not on {device_type}"
    return Resolution("reference", "; ".join(reasons) or no_kernels)


def choose(
    op: str,
    *tensors: Tensor,
    backend: str,
    dtype: torch.dtype,
    arguments: Callable[[], Sequence[Any]] | None = None,
    n_scores: int = 0,
    Tq: int = 1,
    D: int = 64,
    Dv: int | None = None,
    Dp: int | None = None,
    needs_grad: bool = False,
    uses: Collection[str] = (),
) -> str:
    """The backend for a call of a public op: `resolve`'s, if its kernels pass their self-test.

    Only "auto" on a GPU tests kernels. Warns of a failed test and of a costly fallback.

    Args:
        tensors: tensors of the call; the first one gives the device.
        arguments: returns the arguments of the operator; None where it has no kernels.
        n_scores: attention scores that the reference stores.
        backend, dtype, Tq, D, Dv, Dp, needs_grad, uses: the arguments of `resolve`.

    Raises:
        BackendUnavailableError: no backend runs the call, or only the reference does after a
            failed test and its scores need more than 256 MiB.
    """
    device_type = tensors[0].device.type
    sizes = (Tq, max(D, Dv or D, Dp or D))
    failures: dict[str, str] = {}
    name, reason = resolve(
        op,
        backend=backend,
        device=device_type,
        dtype=dtype,
        Tq=Tq,
        D=sizes[1],
        needs_grad=needs_grad,
        uses=uses,
    )
    is_tested = backend == "auto" and device_type in verification.DEVICE_TYPES
    while is_tested and arguments is not None and name is not None and name != "reference":
        failure = verification.failure_of(op, name, arguments())
        if failure is None:
            break
        failures[name] = failure
        name, reason = _resolve(op, backend, failures, device_type, dtype, *sizes, needs_grad, uses)
    if is_tested:
        verification.stop_if_collecting()
    if name is None:
        raise BackendUnavailableError(f"{op}: {reason}")
    if reason is not None:
        score_bytes = n_scores * (8 if dtype == torch.float64 else 4)
        if failures and score_bytes > MANY_BYTES:
            raise BackendUnavailableError(
                f"{op}: the reference would store {score_bytes // 2**20} MiB of scores, because "
                f"{reason}"
            )
        warn_of_fallback(op, reason, score_bytes, tensors)
    return name


def operators(backend: str) -> Any:
    """The operators of "native" or "triton": the namespace `torch.ops.txl_…`."""
    return NATIVE if backend == "native" else TRITON


def _refusal(
    name: str,
    op: str,
    device_type: str,
    dtype: torch.dtype,
    Tq: int,
    head_size: int,
    needs_grad: bool,
    uses: Collection[str],
) -> str | None:
    """Why backend `name` does not run this call, or None where it does."""
    if name == "reference":
        return None
    serves = _SERVES.get((name, op, device_type)) or _SERVES.get((name, op))
    if serves is None:
        return f"this package has no {name} backend for {op}"
    reason: str | None = _unavailable_reason(name, op, device_type, dtype)
    if reason is not None:
        return reason
    if dtype not in serves.dtypes:
        return f"{name} does not support {dtype}"
    if op == "rel_attention" and head_size > (serves.head_size or head_size):
        return f"{name} supports head sizes up to {serves.head_size}, not {head_size}"
    if serves.Tq is not None and Tq > serves.Tq:
        kind = "queries" if op == "rel_attention" else "rows"
        return f"{name} supports up to {serves.Tq} {kind} on {device_type}, not {Tq}"
    if needs_grad and not serves.gradients:
        return f"{name} has no gradients on {device_type}"
    for argument in serves.lacks:
        if argument in uses:
            return f"{name} does not support {argument} yet"
    return None


@constant_in_traces
def _unavailable_reason(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run `op` on this kind of device at all, or None."""
    reason = kernel_refusal(name)
    if reason is not None:
        return reason
    if name == "triton":
        return triton.unavailable_reason(device_type, dtype)
    reason = native.unavailable_reason()
    if reason is not None:
        return reason
    if not _has_kernel(f"{NATIVE.name}::{op}_fwd", device_type):
        return native.no_kernel_reason(op, device_type)
    return cuda_device.unavailable_reason() if device_type == "cuda" else None


@functools.cache
def _has_kernel(operator: str, device_type: str) -> bool:
    """Cached, as it costs 7 µs, a seventh of a small call; called after the library is loaded."""
    return has_kernel(operator, device_type)
