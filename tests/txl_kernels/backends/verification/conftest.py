"""A mocked device: the CPU, with its native kernels, needs records as a GPU does."""

from __future__ import annotations

import warnings

import pytest
import torch

from txl_kernels import resolve
from txl_kernels.backends import verification
from txl_kernels.backends.reference.rel_shift import rel_shift as reference_shift
from txl_kernels.backends.verification import records, selftest

DEVICE = "NVIDIA Mock 1"


@pytest.fixture
def device(monkeypatch, tmp_path):
    """The labels of all problems that were tested, in order."""
    reason = resolve("rel_attention", backend="native", device="cpu").reason
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(verification, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(verification, "device_name", lambda device: DEVICE)
    monkeypatch.setattr(verification, "_verdicts", {})
    monkeypatch.setattr(verification, "_passed_calls", set())
    monkeypatch.setattr(records, "_passed", set())
    monkeypatch.setattr(records, "image_folder", lambda: tmp_path / "image")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tested = []
    check = selftest.check

    def counted(call, device):
        tested.append(call.label + ("+backward" if call.needs_backward else ""))
        check(call, device)

    monkeypatch.setattr(selftest, "check", counted)
    return tested


@pytest.fixture
def new_process(monkeypatch):
    """Forgets all verdicts of this process; files stay."""

    def forget():
        verification._verdicts.clear()
        verification._passed_calls.clear()
        records._passed.clear()

    return forget


@pytest.fixture
def plant():
    """Replaces a native CPU kernel by a Python function, for one test."""
    libraries = []

    def replace(operator, function):
        library = torch.library.Library("txl_native", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it replaces a kernel
            library.impl(operator, function, "CPU", allow_override=True)
        libraries.append(library)

    yield replace
    for library in libraries:
        library._destroy()


@pytest.fixture
def plant_in_shift(plant):
    """Replaces the kernels of `rel_shift` by correct ones with a fault in one direction."""

    def replace(direction, fault):
        def fwd(x, n_keys, offset):
            out = reference_shift(x, n_keys, offset)
            return fault(out) if direction == "forward" else out

        def bwd(dout, n_rows, offset):
            flipped = reference_shift(dout.flip(-2), n_rows, dout.shape[-2] - 1 - offset)
            return fault(flipped.flip(-2)) if direction == "backward" else flipped.flip(-2)

        plant("rel_shift_fwd", fwd)
        plant("rel_shift_bwd", bwd)

    return replace
