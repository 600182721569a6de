"""The checks of `make gpu`, on the CPU: a right kernel passes them, a wrong one does not."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import adaptive_parity, parity, sanitizer
from txl_kernels.testing import ADAPTIVE_SOFTMAX_CASES, REL_ATTENTION_CASES

CHECKS = dict(parity.checks("cpu"))
OPS = ("rel_attention", "decode", "rel_shift", "adaptive_loss", "adaptive_nll")


def test_every_op_is_checked_in_every_dtype_on_every_backend():
    for op in OPS:
        names = [name for name in CHECKS if name.startswith(op)]
        for dtype in ("float32", "float16", "bfloat16"):
            for backend in parity.BACKENDS:
                assert any(name.endswith(f" {dtype} {backend}") for name in names), (op, dtype)
    assert len(CHECKS) >= 6 * len(REL_ATTENTION_CASES)


def test_names_are_unique():
    assert len(CHECKS) == len(list(parity.checks("cpu")))


@pytest.mark.parametrize(
    "name", [name for name in CHECKS if name.startswith("rel_shift") and name.endswith("native")]
)
def test_a_check_passes_or_says_why_it_cannot_run(name):
    try:
        CHECKS[name]()
    except parity.NotServedError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("op", ["adaptive_loss", "adaptive_nll"])
def test_the_adaptive_reference_passes(op, dtype):
    for case in ADAPTIVE_SOFTMAX_CASES:
        adaptive_parity.check_adaptive(case, op, "reference", dtype, "cpu")


def test_a_wrong_gradient_fails(monkeypatch):
    plain = adaptive_parity._plain_nll
    monkeypatch.setattr(adaptive_parity, "_plain_nll", lambda inputs: 1.1 * plain(inputs))
    with pytest.raises(AssertionError, match="over the budget"):
        adaptive_parity.check_adaptive(
            ADAPTIVE_SOFTMAX_CASES[0], "adaptive_nll", "reference", torch.float32, "cpu"
        )


def test_a_worker_counts_what_passed_what_was_refused_and_what_failed(monkeypatch, tmp_path):
    def passes():
        pass

    def refuses():
        raise parity.NotServedError("no kernel")

    def fails():
        raise AssertionError("a bit differs")

    named = [("a", passes), ("b", refuses), ("c", fails), ("d", passes)]
    monkeypatch.setattr(parity, "checks", lambda _device: iter(named))
    path = tmp_path / "out.json"
    parity.work(0, 1, path)
    assert parity.json.loads(path.read_text()) == {
        "passed": 2,
        "refused": {"b": "no kernel"},
        "failures": ["c: AssertionError: a bit differs"],
    }
    parity.work(1, 2, path)
    assert parity.json.loads(path.read_text())["passed"] == 1


def test_the_sanitizer_runs_few_calls_of_every_op():
    names = [name for name, _ in sanitizer.chosen(CHECKS.items())]
    assert 10 <= len(names) <= 40
    for op in OPS:
        assert any(name.startswith(op) for name in names), op
