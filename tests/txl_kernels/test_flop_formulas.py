"""torch's FLOP counter counts the kernels: 2 per multiply-add, backward with its recomputation."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import txl_kernels

B, H, Tq, Ts, Tm, D, Dv = 2, 3, 5, 6, 7, 4, 8
N, d = 6, 16


def flop(forward):
    """Of the forward pass and of backward, where gradients are needed."""
    with FlopCounterMode(display=False) as counter:
        out = forward()
        of_forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    return of_forward, counter.get_total_flops() - of_forward


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("memory", [0, Tm])
def test_attention(require_backend, memory):
    require_backend("rel_attention", "native", needs_grad=True)
    q, k, v, r = leaf(B, H, Tq, D), leaf(B, H, Ts, D), leaf(B, H, Ts, Dv), leaf(1, H, 9, D)
    given = {"mem_k": leaf(B, H, memory, D), "mem_v": leaf(B, H, memory, Dv)} if memory else {}
    pairs = 2 * B * H * Tq * (Ts + memory)
    counted = flop(lambda: txl_kernels.rel_attention(q, k, v, r, **given, backend="native"))
    assert counted == (pairs * (D + D + Dv), pairs * (3 * (D + D) + 2 * Dv))


def test_a_position_query_of_its_own_width():
    formula = flop_registry[torch.ops.txl_triton.rel_attention_fwd]
    q, k, r = torch.empty(B, H, Tq, D), torch.empty(B, H, Ts, D), torch.empty(B, H, 9, 11)
    pairs = 2 * B * H * Tq * Ts
    absent = [torch.empty(0)] * 10
    assert formula(q, k, k, r, absent) == pairs * (D + 11 + D)
    backward = flop_registry[torch.ops.txl_triton.rel_attention_bwd]
    assert backward(q, torch.empty(0), q, k, k, r, absent) == pairs * (3 * (D + 11) + 2 * D)


def softmax(op, *, frozen=False):
    """A head of 10 tokens and 2 clusters, a projected tail of 20 tokens and a plain one of 30."""
    made = torch.randn if frozen else leaf
    hidden = leaf(N, d)
    head, tails = made(12, d), [(made(8, d), made(20, 8), None), (None, made(30, d), None)]
    target = torch.randint(60, (N,))
    return flop(lambda: op(hidden, target, head, tails, cutoffs=(10, 30), backend="native"))


def test_adaptive_losses(require_backend):
    require_backend("adaptive_nll", "native")
    once = 2 * N * (12 * d + (8 * d + 20 * 8 + 30 * d) // 2)
    assert softmax(txl_kernels.adaptive_nll) == (once, 3 * once)
    assert softmax(txl_kernels.adaptive_loss) == (3 * once, 0)
    with torch.no_grad():
        assert softmax(txl_kernels.adaptive_loss) == (once, 0)


def test_frozen_weights_have_no_product_for_their_gradient(require_backend):
    require_backend("adaptive_nll", "native")
    once = 2 * N * (12 * d + (8 * d + 20 * 8 + 30 * d) // 2)
    assert softmax(txl_kernels.adaptive_nll, frozen=True) == (once, 2 * once)
    assert softmax(txl_kernels.adaptive_loss, frozen=True) == (2 * once, 0)


def test_a_softmax_without_tails(require_backend):
    require_backend("adaptive_nll", "native")
    hidden, weight, target = leaf(N, d), leaf(40, d), torch.randint(40, (N,))
    call = {"cutoffs": (), "backend": "native"}
    counted = flop(lambda: txl_kernels.adaptive_loss(hidden, target, weight, [], **call))
    assert counted == (3 * 2 * N * 40 * d, 0)


def test_an_embedding_counts_its_projections(require_backend):
    require_backend("adaptive_embedding", "native")
    tokens, tables = torch.randint(30, (2, 5)), [leaf(10, d), leaf(20, 8)]
    for projections, products in (
        ([None, leaf(d, 8)], 8 * d),
        ([leaf(d, d), leaf(d, 8)], d * d + 8 * d),
    ):
        cost = 2 * 10 * products // 2  # clusters of mean cost
        counted = flop(
            lambda given=projections: txl_kernels.adaptive_embedding(
                tokens, tables, given, (10,), backend="native"
            )
        )
        assert counted == (cost, 2 * cost)


def test_few_rows(require_backend):
    require_backend("few_row_linear", "native")
    x, weight = torch.randn(2, 3, d), torch.randn(5, d)
    counted = flop(lambda: txl_kernels.few_row_linear(x, weight, backend="native"))
    assert counted == (2 * 6 * 5 * d, 0)


def test_copies_count_nothing(require_backend):
    require_backend("rel_shift", "native")
    assert flop(lambda: txl_kernels.rel_shift(leaf(3, 4), backend="native")) == (0, 0)
    table = leaf(10, d)
    tokens = torch.arange(4)
    plain = flop(lambda: txl_kernels.adaptive_embedding(tokens, [table], [None], backend="native"))
    assert plain == (0, 0)


def test_every_operator_of_both_namespaces_has_a_formula():
    for namespace in ("txl_native", "txl_triton"):
        schemas = torch._C._jit_get_all_schemas()
        names = [s.name for s in schemas if re.match(rf"{namespace}::\w+_(fwd|bwd)$", s.name)]
        assert len(names) >= 10
        for name in names:
            operator = getattr(getattr(torch.ops, namespace), name.split("::")[1])
            assert operator in flop_registry, name


def test_a_counter_that_was_imported_first_has_the_formulas_too():
    code = (
        "from torch.utils.flop_counter import flop_registry; import torch, txl_kernels; "
        "assert torch.ops.txl_native.rel_attention_fwd in flop_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
