"""Under tracers the self-test runs outside the program, or does not run where it may not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from txl_kernels import (
    BackendUnavailableError,
    adaptive_embedding,
    adaptive_loss,
    rel_attention,
    rel_shift,
    verify,
)


def every_op(q, weight):
    tokens = torch.zeros(q.shape[2], dtype=torch.int64)
    rows = adaptive_embedding(tokens, [weight], [None])
    loss = adaptive_loss(q[0, 0] + rows, tokens, weight, [], cutoffs=[])
    return rel_attention(q, q, q, q[:1], causal=True).sum() + rel_shift(q).sum() + loss


def inputs(T=30):
    return (
        torch.randn(2, 3, T, 16, requires_grad=True),
        torch.randn(20, 16, requires_grad=True),
    )


def operators(graph_module):
    return {str(node.target).split(".")[0] for node in graph_module.graph.nodes}


def test_a_compiled_program_is_tested_while_it_is_traced(device):
    graphs = []

    def backend(graph_module, example_inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def compiler(graph_module, _):
            graphs.append(graph_module)
            return make_boxed_func(graph_module.forward)

        return aot_autograd(fw_compiler=compiler)(graph_module, example_inputs)

    given = inputs()
    compiled = torch.compile(every_op, fullgraph=True, backend=backend)
    out = compiled(*given)
    out.backward()
    assert len(device) == 4
    assert not [op for graph in graphs for op in operators(graph) if "verify" in op]
    assert torch.equal(out, every_op(*given))
    assert len(device) == 4  # eager calls find the same kernels


def test_sizes_left_open_are_tested_for_lengths_of_every_kind(device):
    compiled = torch.compile(every_op, fullgraph=True, backend="eager", dynamic=True)
    compiled(*inputs(30))
    n = len(device)
    assert device.count("rel_attention/native/float32+backward") == 4
    for T in (31, 48, 77):
        compiled(*inputs(T))
    assert len(device) == n


def test_open_sizes_are_replaced_by_possible_ones_only(device):
    compiled = torch.compile(
        lambda x: rel_shift(x[:, 70:].contiguous()), fullgraph=True, backend="eager", dynamic=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(torch.randn(3, 100))
    assert device == ["rel_shift/native/float32"]


def test_a_compiled_program_uses_the_next_backend(device, plant_in_shift):
    plant_in_shift("backward", lambda out: out + 1)
    given = torch.randn(2, 20, 30, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="the native kernels failed their self-test"):
        out = torch.compile(rel_shift, fullgraph=True, backend="eager")(given)
    (grad,) = torch.autograd.grad(out.sum(), given)
    assert torch.equal(
        grad, torch.autograd.grad(rel_shift(given, backend="reference").sum(), given)[0]
    )


class Attention(torch.nn.Module):
    def forward(self, q):
        return rel_attention(q, q, q, q[:1], causal=True)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_export_uses_recorded_kernels_and_tests_none(device, strict):
    q = torch.randn(2, 3, 30, 16)
    lengths = ({2: torch.export.Dim("T", min=20, max=1000)},)
    words = r"no test runs during torch\.export: call txl_kernels\.verify\(shapes, \*, device\)"
    with pytest.raises(BackendUnavailableError, match=words):
        torch.export.export(Attention(), (q,), dynamic_shapes=lengths, strict=strict)
    assert device == []
    shape = {"B": 2, "H": 3, "D": 16, "biases": False, "causal": True, "gradients": False}
    shapes = [{**shape, "Tq": n, "dtype": torch.float32} for n in (5, 16, 64, 65)]
    assert verify(shapes, device="cpu") == []
    n = len(device)
    program = torch.export.export(Attention(), (q,), dynamic_shapes=lengths, strict=strict)
    assert len(device) == n
    longer = torch.randn(2, 3, 47, 16)
    assert torch.equal(program.module()(longer), Attention()(longer))
    assert len(device) <= n + 1


def test_a_traced_program_is_tested_outside_the_trace(device):
    traced = make_fx(every_op, tracing_mode="symbolic")(*inputs())
    assert {"rel_attention/native/float32+backward"} <= set(device)
    assert "verify" not in traced.code
    assert "randn" not in traced.code
