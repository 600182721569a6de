"""The checks of `make gpu`, on the CPU: a right kernel passes them, a wrong one does not."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect

import pytest
import torch

from benchmarks.gpu import adaptive_parity, attention, parity, sanitizer
from txl_kernels import rel_attention
from txl_kernels.backends.reference import rel_attention as reference
from txl_kernels.testing import ADAPTIVE_SOFTMAX_CASES, REL_ATTENTION_CASES

CHECKS = dict(parity.checks("cpu"))
OPS = (
    "rel_attention", "decode", "rel_shift", "adaptive_loss", "adaptive_nll", "adaptive_embedding",
)  # fmt: skip


def test_every_op_is_checked_in_every_dtype_on_every_backend():
    for op in OPS:
        names = [name for name in CHECKS if name.startswith(op)]
        for dtype in ("float32", "float16", "bfloat16"):
            for backend in parity.BACKENDS:
                assert any(name.endswith(f" {dtype} {backend}") for name in names), (op, dtype)
    assert len(CHECKS) >= 6 * len(REL_ATTENTION_CASES)


def test_names_are_unique():
    assert len(CHECKS) == len(list(parity.checks("cpu")))


# Of each op, in each dtype, the kernels of the CPU stand for those of the GPU.
HERE = [
    name
    for name in CHECKS
    if name.endswith("native")
    and any(word in name for word in ("transformer_xl", "everything", "rel_shift", "two_tails"))
]


@pytest.mark.parametrize("name", HERE)
def test_a_check_passes_or_says_why_it_cannot_run(name):
    try:
        CHECKS[name]()
    except parity.NotServedError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_checks_that_run_here_are_of_every_kind(op, dtype):
    assert any(name.startswith(op) and dtype in name.split() for name in HERE)


def test_a_wrong_output_of_decoding_fails(monkeypatch):
    def wrong(**call):
        out, lse = rel_attention(**{**call, "backend": "reference"})
        return 1.1 * out, lse

    monkeypatch.setattr(parity, "rel_attention", wrong)
    monkeypatch.setattr(parity, "_require", lambda *_, **__: None)
    name = next(name for name in CHECKS if name.startswith("decode"))
    with pytest.raises(AssertionError, match="over the budget"):
        CHECKS[name]()


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("op", ["adaptive_loss", "adaptive_nll"])
def test_the_adaptive_reference_passes(op, dtype):
    for case in ADAPTIVE_SOFTMAX_CASES:
        adaptive_parity.check_adaptive(case, op, "reference", dtype, "cpu")


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_the_embedding_passes(dtype):
    for case in ADAPTIVE_SOFTMAX_CASES:
        adaptive_parity.check_embedding(case, "reference", dtype, "cpu")


def test_an_embedding_scaled_wrong_fails(monkeypatch):
    wrong = functools.partial(_scaled, adaptive_parity.adaptive_embedding)
    monkeypatch.setattr(adaptive_parity, "adaptive_embedding", wrong)
    with pytest.raises(AssertionError, match="over the budget"):
        adaptive_parity.check_embedding(
            ADAPTIVE_SOFTMAX_CASES[0], "reference", torch.float32, "cpu"
        )


def _scaled(embed, *args, **options):
    return 1.01 * embed(*args, **options)


def test_what_is_timed_is_checked_at_its_lengths_gradients_too():
    names = [name for name in CHECKS if name.startswith("at scale")]
    sizes = {(case.Tq, case.Tm, case.D) for case in parity.AT_SCALE}
    for shape in attention.TRAIN:
        assert (shape.Tq, shape.Tm, shape.D) in sizes
        assert any(name.startswith(f"materialised {shape.name}") for name in CHECKS)
    assert len(names) == 2 * len(parity.AT_SCALE)


@pytest.mark.parametrize("factor", [1.0, 1.02])
def test_the_materialised_kernel_gets_the_operators_arguments(factor, monkeypatch):
    """By their names: here the reference stands for it, once a little wrong."""
    kernels = pytest.importorskip("triton") and importlib.import_module(
        "txl_kernels.backends.triton.rel_attention"
    )
    names = list(inspect.signature(kernels.rel_attention_fwd).parameters)[:-1]

    def stand_in(*given):
        call = dict(zip(names, given, strict=True))
        out, lse = reference.rel_attention(**call)
        return factor * out, lse

    monkeypatch.setattr(kernels, "rel_attention_fwd_materialised", stand_in)
    monkeypatch.setattr(parity, "_require", lambda *_, **__: None)
    shape = dataclasses.replace(attention.TRAIN[0], B=1, H=2, Tq=16, Tm=24, D=16)
    if factor == 1.0:
        parity._materialised(shape, "cpu")
    else:
        with pytest.raises(AssertionError, match="of its norm"):
            parity._materialised(shape, "cpu")


def test_workers_records_are_put_together_while_some_still_run(tmp_path):
    files = [tmp_path / f"{n}.json" for n in range(3)]
    parity.write_json(files[0], {"passed": 2, "refused": {"b": "no"}, "failures": ["c: wrong"]})
    parity.write_json(files[2], {"passed": 3, "refused": {}, "failures": []})
    due = {"passed": 5, "refused": {"b": "no"}, "failures": ["c: wrong"]}
    assert parity.gathered(files) == due


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
