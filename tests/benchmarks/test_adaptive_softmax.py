"""The adaptive softmax's cases: targets as words fall, useful work, contenders that are right."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.cases import OURS, PeerUnavailableError, WrongResultError
from benchmarks.cases.adaptive_softmax import (
    CHUNKED,
    FULL,
    HF,
    REFERENCE,
    TORCH,
    TORCH_F32,
    SoftmaxCase,
    arguments,
    expected_results,
)
from benchmarks.peers import adaptive_softmax as peers
from benchmarks.peers import hf
from benchmarks.softmax_inputs import SoftmaxShape, random_softmax
from txl_kernels import adaptive_nll

ONE_TABLE = SoftmaxShape(name="one", N=33, d=20, V=300, cutoffs=(40, 100), div_val=1)
BINS = SoftmaxShape(name="bins", N=33, d=32, V=300, cutoffs=(40, 100), div_val=4)
SHAPES = [pytest.param(shape, id=shape.name) for shape in (ONE_TABLE, BINS)]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.mark.parametrize("work", ["loss", "nll"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_pass_the_gate_and_every_contender_runs(shape, dtype, work):
    case = SoftmaxCase(shape, dtype, work)
    for name in (OURS, TORCH, REFERENCE, *((TORCH_F32,) if dtype == torch.bfloat16 else ())):
        case.check(name)
        with case.contender(name) as run:
            assert run() > 0
            assert run() > 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_hugging_faces_class_passes_the_gate(shape):
    """So our losses and gradients are those of its class, numerically."""
    try:
        hf.interpreter()
    except PeerUnavailableError as error:
        pytest.skip(str(error))
    case = SoftmaxCase(shape, torch.float32, "nll")
    case.check(HF)
    with case.contender(HF) as run:
        assert run() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_expected_is_the_specification(shape):
    inputs = random_softmax(shape, torch.float32).convert(torch.float64)
    nll = adaptive_nll(**arguments(shape, inputs), backend="reference")
    torch.testing.assert_close(expected_results(shape, torch.float32, True)["nll"], nll.detach())


def test_the_gate_stops_a_wrong_result(monkeypatch):
    make = peers.torch_module

    def clusters_turned_round(inputs):
        module = make(inputs)
        rows = list(range(inputs.head_weight.shape[0]))
        rows[-2:] = rows[:-3:-1]
        module.head.weight = inputs.head_weight[rows]
        return module

    monkeypatch.setattr(peers, "torch_module", clusters_turned_round)
    with pytest.raises(WrongResultError, match="nll of torch is off by"):
        SoftmaxCase(ONE_TABLE, torch.float32, "nll").check(TORCH)


def test_the_whole_softmax_is_one_of_the_same_size():
    case = SoftmaxCase(ONE_TABLE, torch.float32, "loss")
    assert set(case.yardsticks) == {FULL, CHUNKED, REFERENCE}
    hidden, table = case._whole_leaves()
    assert table.shape == (300, 20)
    losses = [f(hidden, table, ONE_TABLE.targets()) for f in (peers.full_loss,)]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        losses.append(peers.chunked_full_loss(hidden, table, ONE_TABLE.targets()))
    torch.testing.assert_close(losses[0], losses[-1])
    assert case.result_bytes(FULL) == 4 * (hidden.numel() + table.numel())
    leaves = case._inputs(OURS).leaves().values()
    assert case.result_bytes(OURS) == 4 * sum(x.numel() for x in leaves)


def test_targets_fall_as_words_do():
    shape = SoftmaxShape(name="", N=20_000, d=8, V=267_735, cutoffs=(20_000,), div_val=1)
    targets = shape.targets()
    shares = [float((targets < end).float().mean()) for end in (1, 10, 20_000)]
    assert shares == pytest.approx([0.059, 0.275, 0.921], abs=0.01)
    assert torch.equal(targets, shape.targets())


@pytest.mark.parametrize("shape", SHAPES)
def test_useful_work_is_counted_by_cluster(shape):
    """Three products, 2 operations each, with every weight that a token needs."""
    inputs = random_softmax(shape, torch.float32)
    flop = 6 * inputs.head_weight.numel() * shape.N
    for k, (first, end) in enumerate(itertools.pairwise(shape.ends[1:])):
        n = int(((inputs.target >= first) & (inputs.target < end)).sum())
        flop += 6 * n * inputs.tail_weights[k].numel()
        flop += 6 * n * inputs.projections[k].numel() if inputs.projections else 0
    assert shape.flop == flop
