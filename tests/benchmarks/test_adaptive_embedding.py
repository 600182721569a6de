"""The adaptive embedding's cases: contenders that are right, a gate that stops a wrong one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import OURS, WrongResultError
from benchmarks.cases.adaptive_embedding import ONE_TABLE, TABLES, EmbeddingCase
from benchmarks.peers import adaptive_embedding as peers
from benchmarks.softmax_inputs import SoftmaxShape

ONE = SoftmaxShape(name="one", N=33, d=20, V=300, cutoffs=(40, 100), div_val=1)
BINS = SoftmaxShape(name="bins", N=33, d=32, V=300, cutoffs=(40, 100), div_val=4)
SHAPES = [pytest.param(shape, id=shape.name) for shape in (ONE, BINS)]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_pass_the_gate_and_every_contender_runs(shape, dtype, gradients):
    case = EmbeddingCase(shape, dtype, gradients)
    for name in (OURS, *case.peers, *case.yardsticks):
        case.check(name)
        with case.contender(name) as run:
            assert run() > 0
            assert run() > 0


@pytest.mark.parametrize("gradients", ["dense", "sparse"])
def test_gradients_have_the_layout_that_is_asked_for(gradients):
    case = EmbeddingCase(BINS, torch.float32, gradients)
    for name in (OURS, TABLES, ONE_TABLE):
        embed, leaves = case._bind(name)
        grads = torch.autograd.grad(embed(), leaves, case._dout())
        n_tables = 1 if name == ONE_TABLE else 3
        assert [grad.is_sparse for grad in grads[:n_tables]] == [gradients == "sparse"] * n_tables


def test_the_gate_stops_a_wrong_result(monkeypatch):
    right = peers.table_by_table
    monkeypatch.setattr(
        peers, "table_by_table", lambda *args, **options: right(*args, **options).roll(1, 0)
    )
    with pytest.raises(WrongResultError, match="out of tables is off by"):
        EmbeddingCase(BINS, torch.float32, "dense").check(TABLES)
