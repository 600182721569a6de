"""The check of every op passes correct kernels and fails wrong ones, also without kernels."""

from __future__ import annotations

import re
import types

import pytest
import torch

from txl_kernels.backends import OPS, native
from txl_kernels.ops import rel_shift
from txl_kernels.testing import op_checks, problems

FLOAT32 = (torch.float32,)


@pytest.fixture
def only_rel_shift(monkeypatch):
    kept = [problem for problem in problems.problems() if problem.op == "rel_shift"]
    monkeypatch.setattr(op_checks, "problems", lambda: kept)
    monkeypatch.setattr(op_checks, "_check_sampling", lambda *_: SAMPLING)


SAMPLING = op_checks.OpCheck(
    "adaptive_sample", "reference", "cpu", torch.float32, "forward", 0.5, 1e-3, 2e-3, "", None
)


@pytest.fixture
def plant(monkeypatch, require_backend):
    """Replaces the native kernel of `rel_shift`."""
    require_backend("rel_shift", "native")

    def put(change):
        correct = rel_shift.operators

        def operators(backend):
            kernel = correct(backend).rel_shift_fwd
            return types.SimpleNamespace(rel_shift_fwd=lambda *args: change(kernel(*args)))

        monkeypatch.setattr(rel_shift, "operators", operators)

    return put


def test_every_op_is_checked_and_passes():
    checks = list(op_checks.check_ops("cpu", FLOAT32, min_seconds=0.0))
    assert {check.op.partition(",")[0] for check in checks} == set(OPS)
    assert [check.failure for check in checks] == [None] * len(checks)
    assert all(check.seconds > 0 and check.peer_seconds > 0 for check in checks)
    backward = {check.op for check in checks if check.direction == "backward"}
    assert backward == {*OPS} - {"adaptive_topk", "adaptive_sample", "few_row_linear"}


def one_wrong_element(out):
    wrong = out.clone()
    wrong.view(-1)[7] += 1e-3
    return wrong


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_wrong_element, r"the error of out is .* times the budget"),
        (lambda out: out * torch.nan, "the error of out is inf times the budget"),
        (lambda out: out[:1], r"AssertionError: out: shape .*, expected .*"),
    ],
    ids=["one_element", "nan", "shape"],
)
def test_a_wrong_kernel_fails_its_check(only_rel_shift, plant, change, reason):
    plant(change)
    forward, *_ = op_checks.check_ops("cpu", FLOAT32, min_seconds=0.0)
    assert forward.backend == "native"
    assert re.fullmatch(reason, forward.failure)


def test_a_wrong_gradient_fails_backward_alone(only_rel_shift, plant):
    plant(lambda out: out + 0.0 if not out.requires_grad else Doubled.apply(out))
    forward, backward, _ = op_checks.check_ops("cpu", FLOAT32, min_seconds=0.0)
    assert forward.failure is None
    assert backward.failure.startswith("the error of dx is")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return 2 * dout


def test_a_kernel_that_raises_fails_its_checks_and_no_others(only_rel_shift, plant):
    def out_of_resources(out):
        raise RuntimeError("out of shared memory\nRequired: 110848")

    plant(out_of_resources)
    *failed, sampling = op_checks.check_ops("cpu", FLOAT32, min_seconds=0.0)
    assert [check.failure for check in failed] == ["RuntimeError: out of shared memory"] * 2
    assert all(check.seconds is None and check.peer_seconds > 0 for check in failed)
    assert sampling.failure is None


def test_a_wrong_distribution_fails(monkeypatch):
    sample = op_checks.adaptive_sample

    def without_the_last_cluster(*args, **options):
        return sample(*args, **options).clamp(max=problems.SOFTMAX.cutoffs[-1] - 1)

    monkeypatch.setattr(op_checks, "adaptive_sample", without_the_last_cluster)
    check = op_checks._check_sampling("cpu", torch.float32, 0.0)
    assert check.failure.startswith("the error of the frequencies is")


def test_without_kernels_the_reference_is_checked(monkeypatch, only_rel_shift):
    monkeypatch.setattr(native, "unavailable_reason", lambda: "it was never built")
    checks = list(op_checks.check_ops("cpu", FLOAT32, min_seconds=0.0))
    assert {check.backend for check in checks} == {"reference"}
    assert {check.failure for check in checks} == {None}
