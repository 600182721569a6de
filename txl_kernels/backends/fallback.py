"""Warnings of calls that "auto" gives to the reference although that costs much time or memory."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

import torch
from torch import Tensor

from txl_kernels.backends import native
from txl_kernels.torch_private import is_traced_or_fake
from txl_kernels.transforms import is_jit_tracing

_PACKAGE = __name__.partition(".")[0] + "."
MANY_BYTES = 256 * 2**20
_warned: set[str] = set()  # reasons


def warn_of_fallback(op: str, reason: str, score_bytes: int, tensors: Sequence[Tensor]) -> None:
    """Warns, once per process and reason, that the reference runs a call and why.

    Calls of any size count where the kernels are not built or do not load; other calls only where
    the reference stores more than 256 MiB of attention scores. Traced calls never count.

    Args:
        op: the public op.
        reason: why the preferred backends do not run the call.
        score_bytes: attention scores that the reference stores, in bytes.
        tensors: tensors of the call.
    """
    if _is_traced(tensors):
        return
    not_built = native.unavailable_reason()
    if not_built is not None and not_built in reason:
        text = reason  # with the command that builds them
    elif score_bytes > MANY_BYTES:
        text = f"it stores {score_bytes // 2**20} MiB of scores, because {reason}"
    else:
        return
    kind = re.sub(r"\d+", "", reason)  # another size is not another reason
    if kind not in _warned:
        _warned.add(kind)
        message = f"{op} runs on the plain PyTorch reference: {text}"
        warnings.warn(message, RuntimeWarning, stacklevel=_caller_level())


def _caller_level() -> int:
    """The `stacklevel` of `warn_of_fallback` that points at the caller of a public function."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _module(frame).startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


def _module(frame: FrameType) -> str:
    """The name of a frame's module; "" for code of `exec`, which may have none."""
    return str(frame.f_globals.get("__name__", ""))


def _is_traced(tensors: Sequence[Tensor]) -> bool:
    """Whether torch records or compiles the call instead of computing it."""
    if torch.compiler.is_compiling():
        return True
    if is_jit_tracing():
        return True
    if any(tensor.is_meta for tensor in tensors):
        return True
    return is_traced_or_fake(tensors)
