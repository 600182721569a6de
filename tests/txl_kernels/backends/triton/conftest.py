"""What tests of the Triton kernels share."""

from __future__ import annotations

import contextlib

import pytest
import torch


@pytest.fixture
def poison(monkeypatch):
    """A context in which memory that nobody has written to holds NaN, or the largest integer."""

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.device.type == "meta":
                return x
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return made

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patch:
            for owner, name in (
                (torch, "empty"),
                (torch, "empty_like"),
                (torch.Tensor, "new_empty"),
            ):
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
            yield

    return context
