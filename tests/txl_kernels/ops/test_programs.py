"""The ops in programs that torch exports, packages and traces, and that run elsewhere."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import txl_kernels
from txl_kernels import (
    BackendUnavailableError,
    adaptive_embedding,
    adaptive_loss,
    adaptive_nll,
    rel_attention,
    rel_attention_with_lse,
    rel_shift,
)

RUN_ELSEWHERE = """
import sys, torch, txl_kernels
assert not torch.ops.loaded_libraries
inputs, due = torch.load(sys.argv[2])
load = {"pt2": lambda path: torch.export.load(path).module(),
        "aoti": torch._inductor.aoti_load_package}[sys.argv[3]]
with torch.no_grad():
    torch.testing.assert_close(tuple(load(sys.argv[1])(*inputs)), due)
"""


class EveryOp(nn.Module):
    """All ops that have kernels, with as few arguments as they allow."""

    def __init__(self, backend="auto"):
        super().__init__()
        self.backend = backend
        self.table = nn.Parameter(torch.randn(26, 8))
        self.head, self.tail = nn.Linear(8, 12), nn.Linear(8, 15)

    def forward(self, q, k, v, r, tokens):
        named = {"backend": self.backend}
        attended = rel_attention(q, k, v, r, **named)
        chunked = rel_attention(q, k, v, r, causal=True, chunk=(2, 1), **named)
        placed = {
            "q_pos": v,
            "pos_scale": 0.3,
            "q_start": tokens[:1],
            "key_start": tokens[None] % 3,
        }
        placed |= {"key_lens": tokens[:1], "window": (9, 4)}
        out, lse = rel_attention_with_lse(q, k[:, :1], v[:, :1], r, **placed, **named)
        shifted = rel_shift(q, **named)
        embedded = adaptive_embedding(tokens, [self.table], [None], **named)
        softmax = (self.head.weight, [(None, self.tail.weight, self.tail.bias)])
        nll = adaptive_nll(embedded, tokens, *softmax, cutoffs=(11,), **named)
        loss = adaptive_loss(embedded, tokens, *softmax, cutoffs=(11,), **named)
        return attended, chunked, out, lse, shifted, embedded, nll, loss


def _inputs(T=6):
    q, k, v, r = (torch.randn(1, 2, T, 8) for _ in range(4))
    return q, k, v, r, torch.randint(0, 26, (T,))


@pytest.fixture
def native(require_backend):
    for op in ("rel_attention", "rel_shift", "adaptive_nll", "adaptive_loss", "adaptive_embedding"):
        require_backend(op, "native")


@pytest.fixture
def program(native):
    with torch.no_grad():
        return torch.export.export(EveryOp().eval(), _inputs())


def _run_elsewhere(program, path, kind):
    inputs = _inputs()
    with torch.no_grad():
        due = program.module()(*inputs)
    torch.save((inputs, due), path.with_suffix(".io"))
    arguments = (str(path), str(path.with_suffix(".io")), kind)
    subprocess.run([sys.executable, "-c", RUN_ELSEWHERE, *arguments], check=True)


def test_a_saved_program_runs_where_only_txl_kernels_was_imported(program, tmp_path):
    path = tmp_path / "program.pt2"
    torch.export.save(program, path)
    _run_elsewhere(program, path, "pt2")


@pytest.mark.slow
def test_an_aot_inductor_package_runs(program, tmp_path):
    path = tmp_path / "package.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    _run_elsewhere(program, path, "aoti")


def test_no_operator_gets_an_empty_list(program):
    """AOTInductor passes None where a program holds an empty list."""
    calls = [node for node in program.graph.nodes if str(node.target).startswith("txl_native")]
    assert len(calls) == 7
    for node in calls:
        assert all(len(argument) for argument in node.args if isinstance(argument, (list, tuple)))


def test_an_operator_without_a_kernel_for_its_tensors_says_so(native):
    x = torch.empty(1, 4, 4).to_sparse()
    with pytest.raises(BackendUnavailableError, match="rel_shift: the native library here has no"):
        torch.ops.txl_native.rel_shift_fwd(x, 4, 3)


@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
def test_a_jit_trace_gives_the_same(backend, needs_grad, native):
    module, inputs = EveryOp(backend).requires_grad_(needs_grad), _inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks of shapes, which a trace does not repeat
        traced = torch.jit.trace(module, inputs)
    torch.testing.assert_close(traced(*inputs), module(*inputs))
    if needs_grad:
        for run in (traced, module):
            run(*inputs)[-1].backward()
        twice = module.table.grad
        module.zero_grad()
        module(*inputs)[-1].backward()
        torch.testing.assert_close(twice, 2 * module.table.grad)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_jit_trace_serves_other_lengths(backend):
    module = EveryOp(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, _inputs(6))
    inputs = _inputs(11)
    torch.testing.assert_close(traced(*inputs), module(*inputs))


def test_a_jit_trace_of_a_kernel_warns_that_lengths_are_constants(native):
    def shift(x):
        return rel_shift(x, n_keys=x.shape[-1] - 1, backend="native")

    with pytest.warns(torch.jit.TracerWarning, match="treated as a constant"):
        torch.jit.trace(shift, torch.randn(2, 3, 4))


class Attention(nn.Module):
    """One op and no keyword, for the exporters to ONNX."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v, r):
        return txl_kernels.rel_attention(q, k, v, r, causal=True, backend=self.backend)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_exporting_to_onnx_names_the_reference(backend, native, monkeypatch):
    """Needs no ONNX: both exporters set this flag while they run the model."""
    import torch.onnx

    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    q, k, v, r, _ = _inputs()
    with pytest.raises(BackendUnavailableError, match=r'ONNX has no native .* backend="reference"'):
        Attention(backend)(q, k, v, r)
    Attention("reference")(q, k, v, r)


def test_the_documented_export_to_onnx_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    page = Path(__file__).parents[3] / "docs" / "backends.md"
    example = page.read_text(encoding="utf-8").split("**Export to ONNX.**")[1]
    monkeypatch.chdir(tmp_path)
    exec(example.split("```python\n")[1].split("```")[0], {})
    assert (tmp_path / "attention.onnx").exists()


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
def test_onnx_gives_the_same(dynamo, native, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    inputs, path = _inputs()[:4], tmp_path / "attention.onnx"
    module = Attention("reference")
    torch.onnx.export(module, inputs, path, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(path)
    names = [argument.name for argument in session.get_inputs()]
    (out,) = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    torch.testing.assert_close(torch.from_numpy(out), module(*inputs))
    refused = Attention("auto" if dynamo else "native")  # a trace with "auto" has no kernels
    with pytest.raises(Exception, match='backend="reference"'):
        torch.onnx.export(refused, inputs, path, dynamo=dynamo, verbose=False)
