"""The check of `rel_attention`: the last queries alone, several runs, a context around them."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from txl_kernels.ops import rel_attention as op
from txl_kernels.testing import RelAttentionCase, check_rel_attention, comparison

CASE = RelAttentionCase(
    "sliding", H=2, Tq=24, Tm=4, R=6, options={"causal": True, "offset": 1, "window": (5, None)}
)


def faulty(monkeypatch, fault):
    """Makes the op under test return `fault(out)`; the references stay right."""

    def call(*args, **options):
        out, lse = op.rel_attention_with_lse(*args, **options)
        return (fault(out) if options["backend"] == "native" else out), lse

    monkeypatch.setattr(comparison, "rel_attention_with_lse", call)


def test_the_last_queries_alone_agree(require_backend):
    require_backend("rel_attention", "native", needs_grad=True)
    for case in (CASE, dataclasses.replace(CASE, R=None, options={"causal": True})):
        check_rel_attention(case, "native", torch.float32, last_queries=7, runs=2)


def test_an_error_in_the_last_queries_is_found(monkeypatch, require_backend):
    require_backend("rel_attention", "native", needs_grad=True)
    faulty(monkeypatch, lambda out: out * 1.01)
    with pytest.raises(AssertionError, match="over the budget"):
        check_rel_attention(CASE, "native", torch.float32, last_queries=7)


def test_a_run_with_other_bits_is_found(monkeypatch, require_backend):
    require_backend("rel_attention", "native", needs_grad=True)
    faults = iter([1.0, 1.0, 1.0 + 1e-6])
    faulty(monkeypatch, lambda out: out * next(faults))
    with pytest.raises(AssertionError, match="two runs differ in the bits of out"):
        check_rel_attention(CASE, "native", torch.float32, runs=3)


def test_the_context_is_left_before_the_references_run(require_backend):
    require_backend("rel_attention", "native", needs_grad=True)
    entered = []

    @contextlib.contextmanager
    def within():
        entered.append(True)
        yield
        entered.append(False)

    check_rel_attention(CASE, "native", torch.float32, within=within)
    assert entered == [True, False]
