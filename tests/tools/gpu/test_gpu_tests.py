"""The GPU tests, called with the CPU's native kernels, and their selection without a GPU."""

from __future__ import annotations

import runpy
import types
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "gpu"
PARITY, GRAPHS = (runpy.run_path(str(FOLDER / f"test_{name}.py")) for name in ("parity", "graphs"))
FEW = {"transformer_xl", "one_query", "two_tails"}


def parameters(test):
    """The arguments of each parameter set of a GPU test whose case is one of `FEW`."""
    mark = next(mark for mark in test.pytestmark if mark.args[0] == ("case", "backend", "dtype"))
    return [set_.values for set_ in mark.args[1] if set_.values[0].name in FEW]


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("test_attention", None),
        ("test_three_runs_of_attention_have_the_same_bits", None),
        ("test_decoding", None),
        ("test_softmax_and_embedding", "adaptive_nll"),
        ("test_softmax_and_embedding", "adaptive_embedding"),
    ],
)
def test_parity(name, op):
    test = PARITY[name]
    given = parameters(test)
    assert {dtype for _, _, dtype in given} == set(PARITY["DTYPES"])
    for case, _, dtype in given:
        test(*([op] if op else []), case, "native", dtype, "cpu")


def test_shift():
    PARITY["test_the_shift_is_the_reference_bit_by_bit"](
        (2, 3, 5, 9), 12, None, "native", torch.bfloat16, "cpu"
    )


def test_graphs():
    for case in GRAPHS["REL_ATTENTION_CASES"]:
        if case.name in FEW:
            GRAPHS["test_training"](case, "native", "cpu")
    GRAPHS["test_decoding"](GRAPHS["DECODE_CASES"][0], "native", "cpu")
    for op in ("adaptive_loss", "adaptive_nll", "adaptive_embedding"):
        GRAPHS["test_softmax_and_embedding"](op, "native", "cpu")


class Item:
    """A collected test, of the folder of the GPU tests unless another one is given."""

    def __init__(self, name, folder=FOLDER):
        self.path, self.reasons = folder / name, []

    def add_marker(self, mark):
        self.reasons.append(mark.mark.kwargs["reason"])


@pytest.mark.parametrize("reason", [None, "torch sees no CUDA device"])
def test_without_a_gpu_each_file_is_skipped_with_the_sentence_of_resolve(reason):
    select = runpy.run_path(str(FOLDER / "conftest.py"))["pytest_collection_modifyitems"]
    select.__globals__["resolve"] = lambda *_, **__: ("triton", reason)
    items = [Item("b.py"), Item("a.py", FOLDER.parent), Item("b.py"), Item("c.py"), Item("c.py")]
    kept, deselected = list(items), []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    select(types.SimpleNamespace(hook=hook), kept)
    if reason is None:
        assert kept == items
        return
    assert kept == [items[0], items[1], items[3]]
    assert deselected == [items[2], items[4]]
    assert [item.reasons for item in kept] == [[reason], [], [reason]]
