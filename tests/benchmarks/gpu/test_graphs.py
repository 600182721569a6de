"""Stage "graphs" on the CPU: every op's calls, and a replay that is wrong is noticed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.gpu import adaptive, graphs
from benchmarks.gpu.attention import DECODE, TRAIN
from benchmarks.gpu.stages import UnavailableError

CASES = dict(
    graphs.cases(
        [dataclasses.replace(TRAIN[0], B=1, H=2, Tq=16, Tm=24, D=16)],
        dataclasses.replace(DECODE, B=2, H=2, Tm=24, D=16),
        adaptive.WT103_LARGE.tiny(),
        torch.device("cpu"),
    )
)


def deaf(call):
    """Holds what the call gave once, whatever its inputs are now."""
    return (lambda: None), {name: x.clone() for name, x in call().items()}


def test_forward_backward_and_the_adaptive_ops_are_captured():
    assert list(CASES) == [
        "train_d64/forward",
        "decode/forward",
        "train_d64/forward+backward/deterministic",
        "train_d64/forward+backward/default",
        "adaptive_loss/forward+backward",
        "adaptive_nll/forward+backward",
        "adaptive_embedding/forward+backward",
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_right_replay_passes_and_a_deaf_one_is_wrong_in_every_result(name):
    assert graphs.differences(CASES[name](), graphs.again) == []
    case = CASES[name]()
    results = list(case.call())
    assert graphs.differences(case, deaf) == results
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", [name for name in CASES if "backward" in name])
def test_every_input_that_is_a_number_gets_a_gradient(name):
    case = CASES[name]()
    numbers = [x for x in case.inputs if x.requires_grad]
    assert len(case.call()) == 1 + len(numbers)
    assert len(numbers) >= len(case.inputs) - 2  # all but tokens and the result's gradient


def test_only_sums_by_atomics_may_differ_and_only_a_little():
    right = torch.randn(64)
    near, far = right * (1 + 1e-4), right * 1.1
    assert graphs._same(near, right, loose=True)
    assert not graphs._same(near, right, loose=False)
    assert not graphs._same(far, right, loose=True)
    assert not graphs._same(right * float("nan"), right, loose=True)
    loose = {name: make().loose for name, make in CASES.items()}
    assert [name for name in loose if loose[name]] == ["train_d64/forward+backward/default"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_stage_rehearses_and_says_so():
    results = {}
    with pytest.raises(UnavailableError, match="no CUDA device"):
        graphs.run(results, lambda: None)
    assert len(results["rehearsal"]) == 10
    assert set(results["rehearsal"].values()) == {"it ran"}
