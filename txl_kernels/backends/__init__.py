"""Which implementation of an op runs: `resolve` answers with a backend, or says why none does."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from txl_kernels._register import register
from txl_kernels.backends import native
from txl_kernels.errors import BackendUnavailableError

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
_NATIVE_OPS = ("rel_attention", "rel_shift")
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NATIVE_MAX_HEAD_SIZE = 256
_NATIVE_LACKS = ("q_pos", "bias", "dead_rows='uniform'")

register("txl_native")


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
        needs_grad: whether a backward pass will follow. No backend here goes by it, nor by Tq.
        uses: the optional arguments that not every backend takes and that this call gives:
            "q_pos", "bias", "dead_rows='uniform'".

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
    reason = None
    for name in candidates:
        reason = _refusal(name, op, device_type, dtype, max(D, Dv or D), uses)
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
    head_size: int,
    uses: Collection[str],
) -> str | None:
    """Why backend `name` does not serve this call, or None where it does."""
    if name == "reference":
        return None
    if name == "triton" or op not in _NATIVE_OPS:
        return f"this package has no {name} backend for {op}"
    reason: str | None = _native_refusal(op, device_type)
    if reason is not None:
        return reason
    if dtype not in _NATIVE_DTYPES:
        return f"native does not take {dtype}"
    if op == "rel_attention" and head_size > _NATIVE_MAX_HEAD_SIZE:
        return f"native takes head sizes up to {_NATIVE_MAX_HEAD_SIZE}, not {head_size}"
    for argument in _NATIVE_LACKS:
        if argument in uses:
            return f"native does not take {argument} yet"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _native_refusal(op: str, device_type: str) -> str | None:
    """Why the native library cannot run `op` on this kind of device at all, or None."""
    reason = native.unavailable_reason()
    if reason is not None:
        return reason
    if _has_kernel(f"txl_native::{op}_fwd", device_type):
        return None
    return f"the native library here has no {device_type.upper()} kernel for {op}"


@functools.cache
def _has_kernel(operator: str, device_type: str) -> bool:
    """Asked once the library is loaded: costs 7 µs, a seventh of a small call."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
