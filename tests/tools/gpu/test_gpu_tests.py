"""The GPU tests, called with the CPU's native kernels, and their selection without a GPU."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tools.gpu import memory
from tools.gpu.stages import FIRST_CALL, ROOT

FOLDER = Path(__file__).resolve().parents[2] / "gpu"
PARITY, GRAPHS = (runpy.run_path(str(FOLDER / f"test_{name}.py")) for name in ("parity", "graphs"))
FEW = {"transformer_xl", "one_query", "two_tails"}


@pytest.mark.parametrize("op", ["adaptive_nll", "adaptive_embedding", None])
def test_parity(op):
    names = ["test_attention", "test_decoding"] if op is None else ["test_softmax_and_embedding"]
    for test in map(PARITY.get, names):
        (mark,) = (m for m in test.pytestmark if m.args[0] == ("case", "backend", "dtype"))
        given = [param.values for param in mark.args[1] if param.values[0].name in FEW]
        assert {dtype for _, _, dtype in given} == set(PARITY["DTYPES"])
        for case, _, dtype in given:
            test(*[op] * bool(op), case, "native", dtype, "cpu")


def test_shift():
    test = PARITY["test_the_shift_is_the_reference_bit_by_bit"]
    for shift in PARITY["SHIFTS"][:6]:
        test(*shift, "native", torch.bfloat16, "cpu")


def test_graphs():
    for case in (*GRAPHS["REL_ATTENTION_CASES"][:2], GRAPHS["DECODE_CASES"][0]):
        for trains in (True, False):
            GRAPHS["check_replay"](case, "native", "cpu", trains)
    GRAPHS["test_a_training_step"]("cpu")


def test_a_step_runs_before_it_is_captured(monkeypatch):
    monkeypatch.setattr(torch, "cuda", mock.MagicMock())
    step = mock.Mock()
    replay = memory.captured(step, torch.device("cuda"))
    assert step.call_count == 3
    assert replay is torch.cuda.CUDAGraph().replay


@pytest.mark.parametrize("reason", [None, "torch sees no CUDA device"])
def test_without_a_gpu_each_file_is_skipped_with_the_sentence_of_resolve(reason):
    select = runpy.run_path(str(FOLDER / "conftest.py"))["pytest_collection_modifyitems"]
    select.__globals__["resolve"] = lambda *_, **__: ("triton", reason)
    files = [FOLDER / "b.py", FOLDER.parent / "a.py", FOLDER / "b.py", FOLDER / "c.py"]
    items = [mock.Mock(path=path) for path in files]
    kept, config = list(items), SimpleNamespace(hook=mock.Mock())
    select(config, kept)
    assert kept == (items if reason is None else [items[0], items[1], items[3]])
    assert items[0].add_marker.called == (reason is not None)
    assert not items[1].add_marker.called


def test_the_stages_of_the_first_call_need_torch_and_triton_alone():
    absent = "yaml rich typer accelerate safetensors matplotlib tokenizers tensorboard pytest"
    code = "import sys, importlib\nfor name in sys.argv[1].split(): sys.modules[name] = None\n"
    code += "for name in sys.argv[2:]: importlib.import_module(f'tools.gpu.{name}')"
    names = [stage.name for stage in FIRST_CALL]
    subprocess.run([sys.executable, "-c", code, absent, *names], check=True, cwd=ROOT)
