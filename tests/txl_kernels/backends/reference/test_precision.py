"""The reference computes 16-bit inputs in float32 and rounds each result once, at the end."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import (
    adaptive_embedding,
    adaptive_log_prob,
    adaptive_loss,
    adaptive_nll,
    rel_attention,
    rel_shift,
)
from txl_kernels.testing import ADAPTIVE_SOFTMAX_CASES, REL_ATTENTION_CASES

ATTENTION = {case.name: case for case in REL_ATTENTION_CASES}
SOFTMAX = {case.name: case for case in ADAPTIVE_SOFTMAX_CASES if case.name != "wide_ratio"}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request):
    return request.param


def check(call, tensors):
    """Results and gradients of `call(*tensors)` are those in float32, rounded once."""
    results = []
    for wide in (False, True):
        leaves = [(x.float() if wide else x).detach().requires_grad_() for x in tensors]
        out = call(*leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(out, leaves, dout.to(torch.bfloat16).to(out.dtype))
        results.append([out, *grads])
    for n, (actual, due) in enumerate(zip(*results, strict=True)):
        assert torch.equal(actual.to_dense(), due.to_dense().to(actual.dtype)), n


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("biases", ["narrow", "float32"])
def test_attention(name, biases, dtype):
    floats, others = ATTENTION[name].inputs(dtype)
    if biases == "float32":
        floats |= {n: x.float() for n, x in floats.items() if n.endswith("bias")}

    def call(*tensors):
        given = dict(zip(floats, tensors, strict=True))
        return rel_attention(**given, **others, **ATTENTION[name].options, backend="reference")

    check(call, floats.values())


def test_a_tensor_that_is_given_twice_to_attention(dtype):
    floats, _ = ATTENTION["plain"].inputs(dtype)

    def call(x, r):
        return rel_attention(x, x, x, r, q_pos=x, mem_k=x, mem_v=x, backend="reference")

    check(call, (floats["q"], floats["r"]))


@pytest.mark.parametrize("case", SOFTMAX.values(), ids=str)
@pytest.mark.parametrize("op", [adaptive_nll, adaptive_loss, adaptive_log_prob])
def test_adaptive_softmax(op, case, dtype):
    hidden, target, head, tails = case.inputs(dtype)
    weights = [x for cluster in (head, *tails) for x in cluster]

    def call(hidden, *given):
        given = iter(given)
        flat = [None if x is None else next(given) for x in weights]
        head, *tails = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        return case.call(op, (hidden, target, head, tails), backend="reference")

    check(call, [hidden, *(x for x in weights if x is not None)])


@pytest.mark.parametrize("op", [adaptive_nll, adaptive_log_prob])
def test_a_projection_that_clusters_share(op, dtype):
    hidden, projection = torch.randn(33, 6).to(dtype), torch.randn(4, 6).to(dtype)
    weights = [torch.randn(n, 4).to(dtype) for n in (12, 7, 9)]
    target = torch.arange(33) % 26

    def call(hidden, projection, head_weight, *tails):
        tails = [(projection, weight, None) for weight in tails]
        given = (hidden, target) if op is adaptive_nll else (hidden,)
        options = {"cutoffs": [10, 17], "head_proj": projection, "backend": "reference"}
        return op(*given, head_weight, tails, **options)

    check(call, (hidden, projection, *weights))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_adaptive_embedding(sparse, dtype):
    tokens = torch.arange(600).view(3, 200) % 11
    tables = [torch.randn(5, 8).to(dtype), torch.randn(6, 4).to(dtype)]
    projection = torch.randn(8, 4).to(dtype)

    def call(first, second, projection):
        tables, projections = (first, second), (None, projection)
        options = {"sparse": sparse, "backend": "reference"}
        return adaptive_embedding(tokens, tables, projections, (5,), 2.5, **options)

    check(call, (*tables, projection))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("projected", [False, True])
def test_equal_tokens_are_counted(projected, sparse):
    table = torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)
    projection = torch.eye(2, dtype=torch.bfloat16) if projected else None
    tokens = torch.ones(4096, dtype=torch.int64)
    out = adaptive_embedding(tokens, [table], [projection], sparse=sparse, backend="reference")
    out.sum().backward()
    due = torch.zeros(3, 2)
    due[1] = 4096
    assert torch.equal(table.grad.to_dense().float(), due)


def test_a_projection_and_a_table_that_clusters_share(dtype):
    tokens = torch.arange(300) % 10
    table, projection = torch.randn(5, 4).to(dtype), torch.randn(8, 4).to(dtype)

    def call(table, projection):
        shared = [table, table], [projection, projection]
        return adaptive_embedding(tokens, *shared, (5,), backend="reference")

    check(call, (table, projection))


def test_the_shift(dtype):
    x = torch.randn(2, 3, 5, 9).to(dtype)
    check(lambda x: rel_shift(x, n_keys=20, offset=2, backend="reference"), [x])
