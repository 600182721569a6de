"""What rel_attention means, beside its numbers: memory, segments, batches, dropout, strides."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_attention, rel_attention_with_lse
from txl_kernels.testing import RelAttentionCase, dropout_keep


@pytest.fixture(params=["reference", "native"])
def backend(request, require_backend):
    require_backend("rel_attention", request.param, needs_grad=True)
    return request.param


def _close(actual, due):
    torch.testing.assert_close(actual, due, rtol=2e-5, atol=2e-5)


def _model(T, B=2, H=3, D=16):
    """q, k, v of T tokens, and r for the distances T - 1 … 0."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(B, H, T, D, generator=generator) for _ in range(3))
    return q, k, v, torch.randn(1, H, T, D, generator=generator)


@pytest.mark.parametrize("segment", [1, 4, 7])
def test_segment_by_segment_with_memory_equals_one_pass(backend, segment):
    T = 24
    q, k, v, r = _model(T)
    whole = rel_attention(q, k, v, r, causal=True, backend=backend)
    parts = []
    for start in range(0, T, segment):
        now = slice(start, min(start + segment, T))
        memory = {} if start == 0 else {"mem_k": k[:, :, :start], "mem_v": v[:, :, :start]}
        reach = r[:, :, T - now.stop :]  # distances now.stop - 1 … 0
        part = rel_attention(
            q[:, :, now], k[:, :, now], v[:, :, now], reach, causal=True, **memory, backend=backend
        )
        parts.append(part)
    _close(torch.cat(parts, 2), whole)


def test_memory_and_segment_equal_their_concatenation(backend):
    case = RelAttentionCase("", Tq=9, Tm=14, D=20, options={"causal": True})
    floats, _ = case.inputs(torch.float32)
    split = rel_attention(**floats, causal=True, backend=backend)
    memory = {name: floats.pop(name) for name in ("mem_k", "mem_v")}
    floats["k"] = torch.cat([memory["mem_k"], floats["k"]], 2)
    floats["v"] = torch.cat([memory["mem_v"], floats["v"]], 2)
    _close(rel_attention(**floats, causal=True, backend=backend), split)


def test_permuting_the_batch_permutes_the_result(backend):
    case = RelAttentionCase("", B=4, key_start=[0, 3, 9, 21], key_lens=[22, 20, 15, 22])
    floats, others = case.inputs(torch.float32)
    order = torch.tensor([2, 0, 3, 1])
    permuted = {n: x if n.startswith("r") else x[order] for n, x in floats.items()}
    lengths = {name: x[order] for name, x in others.items()}
    _close(
        rel_attention(**permuted, **lengths, backend=backend),
        rel_attention(**floats, **others, backend=backend)[order],
    )


def test_without_positions_it_is_scaled_dot_product_attention(backend):
    q, k, v, r = _model(12)
    due = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    _close(rel_attention(q, k, v, 0 * r, causal=True, backend=backend), due)


def test_key_lengths_equal_the_shorter_call(backend):
    q, k, v, r = _model(20)
    lens = torch.tensor([13, 13], dtype=torch.int32)
    padded = rel_attention(q, k, v, r, key_lens=lens, causal=True, backend=backend)
    r13 = r[:, :, 7:]
    short = rel_attention(
        q[:, :, :13], k[:, :, :13], v[:, :, :13], r13, causal=True, backend=backend
    )
    _close(padded[:, :, :13], short)


def test_a_row_without_keys_is_zero_and_takes_no_gradient(backend):
    case = RelAttentionCase("", Tm=0, key_start=[17, 0])
    floats, others = case.inputs(torch.float32)
    out, lse = rel_attention_with_lse(**floats, **others, backend=backend)
    out.sum().backward()
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    for name in ("q", "k", "v"):
        assert not floats[name].grad[0].any()
    assert all(x.grad.isfinite().all() for x in floats.values())


def test_dropout_is_the_published_mask(backend):
    """With v the identity, the output is the dropped probabilities themselves."""
    B, H, T, p = 2, 3, 21, 0.4
    q, k, _, r = _model(T)
    v = torch.eye(T).expand(B, H, T, T)
    seed = torch.tensor(-987654321987)
    probs = rel_attention(q, k, v, r, causal=True, backend=backend)
    out = rel_attention(q, k, v, r, causal=True, dropout_p=p, dropout_seed=seed, backend=backend)
    keep = dropout_keep(seed, p, (B, H, T, T))
    assert torch.equal(out != 0, keep & (probs != 0))
    _close(out, torch.where(keep, probs / (1 - p), 0.0))


def test_dropout_follows_torch_s_generator(backend):
    q, k, v, r = _model(9)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(rel_attention(q, k, v, r, dropout_p=0.5, backend=backend))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_strides_do_not_matter(backend):
    case = RelAttentionCase("", D=24, mask=(2, 1, 17, 22))
    floats, others = case.inputs(torch.float32)
    due = rel_attention(**floats, **others, backend=backend)
    strided = {}
    for n, (name, x) in enumerate(floats.items()):
        wide = torch.empty(*x.shape[:-1], 3 * x.shape[-1]).normal_()
        part = wide[..., :: 3 if n % 2 else 1][..., : x.shape[-1]]
        part.copy_(x.detach())
        strided[name] = part
    _close(rel_attention(**strided, **others, backend=backend), due)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 1), (1, 1, 1, 8), (2, 1, 17, 8)])
def test_an_expanded_output_gradient_counts_as_its_copy(backend, shape):
    floats, _ = RelAttentionCase("").inputs(torch.float32)
    out = rel_attention(**floats, causal=True, backend=backend)
    dout = torch.randn(shape).expand_as(out)
    leaves = list(floats.values())
    expanded = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    copied = torch.autograd.grad(out, leaves, dout.contiguous())
    for a, b in zip(expanded, copied, strict=True):
        _close(a, b)


def test_only_the_gradients_asked_for_are_formed(backend):
    floats, _ = RelAttentionCase("").inputs(torch.float32)
    due = torch.autograd.grad(rel_attention(**floats, backend=backend).sum(), floats["r"])[0]
    alone = {name: x.detach().requires_grad_(name == "r") for name, x in floats.items()}
    rel_attention(**alone, backend=backend).sum().backward()
    _close(alone["r"].grad, due)
    assert all(x.grad is None for name, x in alone.items() if name != "r")


def test_the_gradient_of_lse_in_a_row_without_keys_is_ignored(backend):
    case = RelAttentionCase("", Tm=0, key_start=[17, 0])
    floats, others = case.inputs(torch.float32)
    lse = rel_attention_with_lse(**floats, **others, backend=backend)[1]
    dlse = torch.ones_like(lse)
    due = torch.autograd.grad(
        lse, list(floats.values()), dlse, retain_graph=True, allow_unused=True
    )
    dlse[0] = float("nan")
    actual = torch.autograd.grad(lse, list(floats.values()), dlse, allow_unused=True)
    assert not due[0][0].any()
    assert due[0][1].any()
    for grad, expected in zip(actual, due, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=0)


def test_two_runs_give_the_same_bits(backend):
    floats, _ = RelAttentionCase("", B=3, Tq=40, Tm=70, D=32).inputs(torch.float32)
    leaves = list(floats.values())

    def run():
        out = rel_attention(**floats, causal=True, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("B", "Tq", "Ts"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_sizes_give_empty_or_zero_results(backend, B, Tq, Ts):
    q, k = torch.randn(B, 3, Tq, 8, requires_grad=True), torch.randn(B, 3, Ts, 8)
    out = rel_attention(q, k, k, torch.randn(1, 3, 5, 8), backend=backend)
    out.sum().backward()
    assert out.shape == (B, 3, Tq, 8)
    assert not out.any() or Ts > 0
    assert q.grad.shape == q.shape
