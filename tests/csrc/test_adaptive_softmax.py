"""The native adaptive softmax at its edges: sizes, threads, memory, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from txl_kernels import adaptive_loss, adaptive_nll, resolve
from txl_kernels.testing import AdaptiveSoftmaxCase as Case

_, REASON = resolve("adaptive_nll", backend="native", device="cpu", dtype=torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def _leaves(inputs):
    hidden, _, head, tails = inputs
    tensors = [hidden, *head, *(x for tail in tails for x in tail)]
    return [x for x in tensors if x is not None]


def _results(case, inputs, op, backend="native"):
    loss = case.call(op, inputs, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), _leaves(inputs))]


def _agree(case, dtype=torch.float64, rtol=1e-10):
    """Both ops against the reference, which cuts nothing into tiles."""
    inputs = case.inputs(dtype)
    for op in (adaptive_nll, adaptive_loss):
        for actual, due in zip(
            _results(case, inputs, op), _results(case, inputs, op, "reference"), strict=True
        ):
            torch.testing.assert_close(actual, due, rtol=rtol, atol=rtol)


@settings(max_examples=40)
@given(
    st.integers(1, 150),
    st.lists(st.integers(1, 149), max_size=3, unique=True),
    st.integers(0, 70),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
)
def test_any_sizes(V, cutoffs, N, d, project, bias):
    cutoffs = tuple(sorted(c for c in cutoffs if c < V))
    _agree(Case("", V, cutoffs, N, d, project=project, bias=bias))


@pytest.mark.parametrize(
    "case",
    [
        Case("tiles_of_tokens", V=200, cutoffs=(70,), N=700, d=9),
        Case("one_column_over", V=129, N=65, d=17),
        Case("wide", V=100, cutoffs=(30,), N=33, d=700, div=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_more_than_one_tile(case, dtype):
    _agree(case, dtype, 1e-10 if dtype == torch.float64 else 1e-4)


def test_blocks_of_tokens():
    """A chunk of 21 MiB holds the logits of 150 tokens in float64."""
    _agree(Case("", V=20_000, N=700, d=8, project=False))


def test_logits_held_in_part():
    """A chunk holds the logits of six tokens in float64, and makes the others' again."""
    _agree(Case("", V=524_288, N=40, d=2, project=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_blocks_are_rounded_once(dtype):
    """10 blocks or more; each rounded to the gradient's dtype, their sum would err three times as
    much."""
    generator = torch.Generator().manual_seed(3)
    V, N, d = 20_000, 6_000, 8
    hidden, weight = (torch.randn(n, d, generator=generator).to(dtype) for n in (N, V))
    target = torch.randint(V, (N,), generator=generator)

    def gradient(dtype):
        leaf = weight.to(dtype).requires_grad_()
        options = {"cutoffs": (), "reduction": "sum", "backend": "native"}
        adaptive_loss(hidden.to(dtype), target, leaf, [], **options).backward()
        return leaf.grad.double()

    due = gradient(torch.float64)
    rounding = (due.to(dtype).double() - due).norm()
    assert (gradient(dtype) - due).norm() <= 1.2 * rounding


@pytest.mark.parametrize("cluster", [0, 1, 2])
def test_all_tokens_in_one_cluster(cluster):
    case = Case("", V=90, cutoffs=(20, 50), N=50)
    inputs = case.inputs(torch.float64)
    edges = (0, 20, 50, 90)
    inputs[1].copy_(torch.randint(edges[cluster], edges[cluster + 1], (50,)))
    for op in (adaptive_nll, adaptive_loss):
        torch.testing.assert_close(
            _results(case, inputs, op), _results(case, inputs, op, "reference")
        )


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_forbidden_tokens_and_large_biases_stay_finite(dtype, rtol):
    """A bias of -inf forbids a token, whole tiles of them too; 300 overflows an exponential."""
    case = Case("", V=300, N=21)
    inputs = case.inputs(dtype)
    bias = inputs[2][2].detach()
    bias[64:192] = -torch.inf
    bias[7] = 300.0
    inputs[1].clamp_(max=50)
    for op in (adaptive_nll, adaptive_loss):
        results = _results(case, inputs, op)
        assert all(x.isfinite().all() for x in results)
        due = _results(case, inputs, op, "reference")
        torch.testing.assert_close(results, due, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss], ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(op, dtype):
    case = Case("", V=5000, cutoffs=(1000,), N=300, d=64)
    inputs = case.inputs(dtype)
    assert all(map(torch.equal, _results(case, inputs, op), _results(case, inputs, op)))


@pytest.mark.parametrize("token", [-1, 50, -101, 2**40])
def test_a_target_out_of_range_is_an_index_error(token):
    case = Case("", V=50, cutoffs=(10,))
    inputs = case.inputs(torch.float32)
    inputs[1][3] = token
    for op in (adaptive_nll, adaptive_loss):
        with pytest.raises(IndexError, match=rf"target must be in \[0, 50\), got {token}"):
            case.call(op, inputs, backend="native")


def test_float16_gradients_survive_a_large_mean():
    """A mean over 2,000 tokens leaves less of most gradients than float16 can hold."""
    case = Case("", V=4000, N=2001, d=8, project=False, bias=False)
    inputs = case.inputs(torch.float16)
    loss = 1024 * case.call(adaptive_loss, inputs, backend="native")
    (grad,) = torch.autograd.grad(loss, inputs[2][1])
    hidden, target, (_, weight, _), _ = inputs
    wide = (hidden.double(), target, (None, weight.double(), None), [])
    due_loss = 1024 * case.call(adaptive_loss, wide, backend="reference")
    (due,) = torch.autograd.grad(due_loss, weight)
    assert float((grad.double() - due.double()).norm() / due.double().norm()) < 2e-3


MEMORY = """
import resource, torch
from txl_kernels import adaptive_loss, adaptive_nll
torch.set_num_threads(2)
V, N, d, dtype = 60_000, 512, 64, getattr(torch, {dtype!r})
weight = torch.randn(V, d).div_(8).to(dtype).requires_grad_()
hidden = torch.randn(N, d).to(dtype).requires_grad_()
target = torch.randint(0, V, (N,))
def step():
    loss = {op}(hidden, target, weight, [], cutoffs=(), backend="native").sum()
    return torch.autograd.grad(loss, (hidden, weight))
adaptive_nll(hidden[:1], target[:1], weight, [], cutoffs=(), backend="native").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grads = step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    ("op", "dtype", "mib"),
    [
        ("adaptive_nll", "float32", 10),
        ("adaptive_loss", "float32", 30),
        ("adaptive_loss", "bfloat16", 30),
    ],
)
def test_memory_stays_within_one_chunk(op, dtype, mib):
    """The full logits would be 117 MiB in float32, several times over; a chunk is 21 MiB."""
    script = MEMORY.format(op=op, dtype=dtype)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    gradients = 60_000 * 64 * (4 if dtype == "float32" else 2) / 2**20
    assert int(run.stdout) / 1024 < gradients + mib


@pytest.mark.parametrize(
    ("capability", "onednn"),
    [("default", "default"), ("avx2", "avx2"), ("avx512", "default"), ("avx512", "avx2")],
)
def test_every_instruction_set_gives_the_same(capability, onednn, require_instruction_set):
    """Also if oneDNN has fewer instructions than ATen, and so no products of packed bfloat16."""
    require_instruction_set(capability)
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_adaptive_softmax as t\n"
        "case = t.Case('', V=150, cutoffs=(40, 90), N=37, d=24)\n"
        "for dtype in (torch.float64, torch.float32): t._agree(case, dtype, 1e-4)\n"
        "results = t._results(case, case.inputs(torch.bfloat16), t.adaptive_loss)\n"
        "due = t._results(case, case.inputs(torch.bfloat16), t.adaptive_loss, 'reference')\n"
        "torch.testing.assert_close(results, due, rtol=0.05, atol=2e-3)\n"
    )
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "ONEDNN_MAX_CPU_ISA": onednn.upper(),
    }
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
