"""Fills new memory with NaN, so that tests find a kernel that does not write all of its output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_ALLOCATE = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))


@contextlib.contextmanager
def filled_with_nan(*, deterministic: bool | None = None) -> Iterator[None]:
    """New tensors hold NaN, or the largest integer.

    Under deterministic algorithms torch fills the tensors that C++ allocates too. Without them only
    the functions by which Python allocates can be replaced.

    Args:
        deterministic: the setting of `torch.use_deterministic_algorithms` within; None: unchanged.
    """
    mode = torch.get_deterministic_debug_mode()
    with contextlib.ExitStack() as stack:
        for owner, name in _ALLOCATE:
            stack.enter_context(mock.patch.object(owner, name, _filling(getattr(owner, name))))
        if deterministic is not None:
            stack.callback(torch.set_deterministic_debug_mode, mode)
            # cuBLAS's own products would raise without a setting of the environment.
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
        yield


def _filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocated(*args: Any, **options: Any) -> Tensor:
        x = allocate(*args, **options)
        if x.device.type == "meta":
            return x
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

    return allocated
