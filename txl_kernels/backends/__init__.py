"""Which implementation of an op runs: `resolve` answers with a backend, or says why none does."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from txl_kernels._register import register
from txl_kernels.backends import cuda_device, native, triton
from txl_kernels.errors import BackendUnavailableError
from txl_kernels.transforms import is_jit_tracing, kernel_refusal

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
)
_AUTO = {"cpu": ("native", "reference"), "cuda": ("native", "triton", "reference")}

_FLOAT_TO_16_BIT = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT = (*_FLOAT_TO_16_BIT, torch.float64)
_DENSE_ARGUMENTS = ("q_pos", "bias", "dead_rows='uniform'")


class Serves(NamedTuple):
    """What one backend takes of one op. Tq and head sizes: the largest; None: no limit."""

    dtypes: Collection[torch.dtype]
    head_size: int | None = None
    Tq: int | None = None
    gradients: bool = True
    lacks: Collection[str] = ()  # optional arguments, in the words of `resolve`'s `uses`


# (backend, op) or, where devices differ, (backend, op, device type), which goes before.
# The reference takes every call and is not listed.
_SERVES: dict[tuple[str, ...], Serves] = {
    ("native", "rel_attention"): Serves(_FLOAT, head_size=256, lacks=_DENSE_ARGUMENTS),
    ("native", "rel_attention", "cuda"): Serves(
        _FLOAT_TO_16_BIT,
        head_size=256,
        Tq=16,
        gradients=False,
        lacks=(*_DENSE_ARGUMENTS, "dropout_p"),
    ),
    ("native", "rel_shift"): Serves(_FLOAT),
    ("native", "adaptive_loss"): Serves(_FLOAT),
    ("native", "adaptive_nll"): Serves(_FLOAT),
    ("native", "adaptive_embedding"): Serves(_FLOAT),
    ("triton", "rel_attention"): Serves(_FLOAT_TO_16_BIT, head_size=256, lacks=_DENSE_ARGUMENTS),
    ("triton", "rel_shift"): Serves(_FLOAT),
    ("triton", "adaptive_loss"): Serves(_FLOAT_TO_16_BIT),
    ("triton", "adaptive_nll"): Serves(_FLOAT_TO_16_BIT),
    ("triton", "adaptive_embedding"): Serves(_FLOAT_TO_16_BIT),
}

register("txl_native")
register("txl_triton")
native.register_kernels()
triton.register_kernels()


class Resolution(NamedTuple):
    """The backend that runs a call; or None and one sentence that says why."""

    backend: str | None
    reason: str | None


def resolve(
    op: str,
    *,
    backend: str = "auto",
    device: torch.device | str,
    dtype: torch.dtype,
    Tq: int = 1,
    D: int = 64,
    Dv: int | None = None,
    needs_grad: bool = False,
    uses: Collection[str] = (),
) -> Resolution:
    """Says which backend serves a call, or why none does. Only "auto" chooses.

    The ops themselves, `transformer-xl doctor` and the skip reasons of tests all ask here.

    Args:
        op: name of a public op, such as "rel_attention".
        backend: "auto", "reference", "native" or "triton".
        device, dtype: of the tensors.
        Tq: queries (for the adaptive ops: tokens).
        D, Dv: head size of keys and of values (None: the same); of `rel_attention` alone.
        needs_grad: whether a backward pass will follow.
        uses: the optional arguments that not every backend takes and that this call gives:
            "q_pos", "bias", "dead_rows='uniform'", "dropout_p".

    Raises:
        ValueError: no such op or backend.
    """
    if op not in OPS:
        raise ValueError(f"resolve: op must be one of {', '.join(OPS)}; got {op!r}")
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"{op}: backend must be one of {names}; got {backend!r}")
    device_type = torch.device(device).type
    candidates = _AUTO.get(device_type, ("reference",)) if backend == "auto" else (backend,)
    if backend == "auto" and is_jit_tracing():  # a kernel's lengths would be constants
        candidates = ("reference",)
    reason = None
    for name in candidates:
        reason = _refusal(name, op, device_type, dtype, Tq, max(D, Dv or D), needs_grad, uses)
        if reason is None and name != "reference" and _exports_onnx():
            reason = f'ONNX has no {name} kernel: export with backend="reference"'
            return Resolution(None, reason)
        if reason is None:
            return Resolution(name, None)
    return Resolution(None, reason)


def choose(op: str, **call: Any) -> str:
    """`resolve`'s backend, from the same arguments.

    Raises:
        BackendUnavailableError: with `resolve`'s sentence, where there is none.
    """
    name, reason = resolve(op, **call)
    if name is None:
        raise BackendUnavailableError(f"{op}: {reason}")
    return name


def operators(backend: str) -> Any:
    """The namespace of a backend that `choose` gave, "reference" excepted: `torch.ops.txl_…`."""
    return getattr(torch.ops, f"txl_{backend}")


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
    """Why backend `name` does not serve this call, or None where it does."""
    if name == "reference":
        return None
    serves = _SERVES.get((name, op, device_type)) or _SERVES.get((name, op))
    if serves is None:
        return f"this package has no {name} backend for {op}"
    reason: str | None = _door_refusal(name, op, device_type, dtype)
    if reason is not None:
        return reason
    if dtype not in serves.dtypes:
        return f"{name} does not take {dtype}"
    if op == "rel_attention" and head_size > (serves.head_size or head_size):
        return f"{name} takes head sizes up to {serves.head_size}, not {head_size}"
    if serves.Tq is not None and Tq > serves.Tq:
        return f"{name} takes up to {serves.Tq} queries on {device_type}, not {Tq}"
    if needs_grad and not serves.gradients:
        return f"{name} has no gradients on {device_type}"
    for argument in serves.lacks:
        if argument in uses:
            return f"{name} does not take {argument} yet"
    return None


def _exports_onnx() -> bool:
    """Whether torch exports to ONNX at the moment; imports nothing of torch.onnx."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


_exports_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _door_refusal(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run `op` on this kind of device at all, or None."""
    reason = kernel_refusal(name)
    if reason is not None:
        return reason
    if name == "triton":
        return triton.unavailable_reason(device_type, dtype)
    reason = native.unavailable_reason()
    if reason is not None:
        return reason
    if not _has_kernel(f"txl_native::{op}_fwd", device_type):
        return native.no_kernel_reason(op, device_type)
    return cuda_device.unavailable_reason() if device_type == "cuda" else None


# What `torch.compiler.assume_constant_result` does; that would import torch._dynamo, in seconds,
# and with it Triton.
_door_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _has_kernel(operator: str, device_type: str) -> bool:
    """Asked once the library is loaded: costs 7 µs, a seventh of a small call."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
