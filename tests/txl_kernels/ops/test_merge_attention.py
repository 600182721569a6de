"""Attention over parts of the keys merges to attention over all; a sink is one more key."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import merge_attention, rel_attention_with_lse, with_sink

INF = torch.inf


def parts(generator_seed=0, dtype=torch.float64):
    """Three parts of 2 x 3 x 5 queries: rows with keys everywhere, in some parts, in none."""
    generator = torch.Generator().manual_seed(generator_seed)
    outs = torch.randn(3, 2, 3, 5, 4, generator=generator, dtype=torch.float64).to(dtype)
    lses = 5 * torch.randn(3, 2, 3, 5, generator=generator, dtype=torch.float64)
    lses[0, 0, 0] = lses[1:, 0, 1] = lses[:, 0, 2] = lses[2, 1] = -INF
    return outs, lses if dtype == torch.float64 else lses.float()


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def no_nan(*tensors):
    return not any(x.isnan().any() for x in tensors)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_parts_of_the_keys_merge_to_attention_over_all(backend, require_backend):
    """Row 1 of the batch has no key in the first part, row 2 has none at all."""
    require_backend("rel_attention", backend, dtype=torch.float64, needs_grad=True)
    B, H, T, D = 3, 2, 9, 4
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, H, T, D)] * 3 + [(1, H, T, D)]
    inputs = leaves(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes))
    end = torch.tensor([T, T, 0])
    ranges = [(torch.tensor([0, 5, 0]), torch.tensor([4, 3, 0])), (torch.tensor([4, 0, 3]), end)]

    def attend(start, end):
        return rel_attention_with_lse(
            *inputs, causal=True, key_start=start, key_lens=end, backend=backend
        )

    out, lse = attend(torch.zeros(3, dtype=torch.int64), end)
    merged, merged_lse = merge_attention(*zip(*(attend(*r) for r in ranges), strict=True))
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse)
    assert (merged_lse[2] == -INF).all()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads, expected = (
        torch.autograd.grad(results, inputs, (dout, dlse))
        for results in ((merged, merged_lse), (out, lse))
    )
    for actual, due in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, due)


@pytest.mark.parametrize("sink_shape", [(3, 1), (2, 3, 5)], ids=["per_head", "per_query"])
def test_a_sink_is_a_column_of_the_softmax(sink_shape):
    """Query 2 of head 1 has no key, head 2 has no sink where it is per head."""
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64) * 3
    scores[:, 1, 2] = -INF
    values = torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64)
    sink = torch.randn(sink_shape, generator=generator, dtype=torch.float64)
    sink[-1] = -INF
    scores, values, sink = leaves(scores, values, sink)

    lse = scores.logsumexp(-1)
    dead = lse == -INF
    out = scores.masked_fill(dead[..., None], 0.0).softmax(-1).masked_fill(dead[..., None], 0.0)
    actual = with_sink(out @ values, lse, sink)

    columns = torch.cat([scores, sink.expand(2, 3, 5)[..., None]], dim=-1)
    none = (columns == -INF).all(-1)
    probs = columns.masked_fill(none[..., None], 0.0).softmax(-1).masked_fill(none[..., None], 0.0)
    due_lse = columns.masked_fill(none[..., None], 0.0).logsumexp(-1).masked_fill(none, -INF)
    due = probs[..., :-1] @ values, due_lse
    for mine, expected in zip(actual, due, strict=True):
        torch.testing.assert_close(mine, expected)
    douts = torch.randn_like(due[0]), torch.randn_like(due[1])
    grads = [torch.autograd.grad(results, (values, sink), douts) for results in (actual, due)]
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected)


def test_no_sink_changes_nothing():
    outs, lses = parts(dtype=torch.bfloat16)
    out, lse = with_sink(outs[2], lses[2], torch.tensor(-INF))
    dead = lses[2] == -INF
    assert torch.equal(out, outs[2].masked_fill(dead[..., None], 0.0))
    assert torch.equal(lse, lses[2])


def test_gradients_are_exact_and_ignore_rows_without_keys():
    outs, lses = parts()
    outs, lses = outs[:, :1, :, :1, :2], lses[:, :1, :, :1]
    sink = torch.randn(3, 1, dtype=torch.float64)
    sink[0] = -INF
    has_keys = lses != -INF

    def finite(outs, scores, sink):
        out, lse = merge_attention(outs.unbind(), torch.where(has_keys, scores, -INF).unbind())
        out, lse = with_sink(out, lse, torch.stack([torch.full_like(sink[0], -INF), *sink[1:]]))
        return out, lse.masked_fill(lse == -INF, 0.0)

    inputs = leaves(outs, lses.masked_fill(~has_keys, 0.0), sink.masked_fill(sink == -INF, 0.0))
    assert torch.autograd.gradcheck(finite, inputs)


def test_nan_in_a_part_without_keys_does_not_spread():
    """NaN in its out, and NaN as the incoming gradient of a query without keys."""
    outs, lses = parts()
    dead_part, dead = lses == -INF, (lses == -INF).all(0)
    outs.masked_fill_(dead_part[..., None], torch.nan)
    outs, lses, sink = leaves(outs, lses, torch.full((3, 1), -INF, dtype=torch.float64))
    out, lse = merge_attention(outs.unbind(), lses.unbind())
    sunk_out, sunk_lse = with_sink(out, lse, sink)
    for result, log in ((out, lse), (sunk_out, sunk_lse)):
        assert no_nan(result, log)
        assert (result[dead] == 0).all()
        assert (log[dead] == -INF).all()
        douts = torch.randn_like(result), torch.randn_like(log)
        for dout in douts:
            dout[dead] = torch.nan
        inputs = (outs, lses) if log is lse else (outs, lses, sink)
        grads = torch.autograd.grad((result, log), inputs, douts, retain_graph=True)
        assert no_nan(*grads)
        assert (grads[0][dead_part] == 0).all()
        assert (grads[1][dead_part] == 0).all()
        assert grads[1][:, ~dead].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_float32_and_out_has_its_own_dtype(dtype):
    outs, lses = parts(dtype=dtype)
    out, lse = merge_attention(outs.unbind(), lses.unbind())
    exact, exact_lse = merge_attention(outs.double().unbind(), lses.double().unbind())
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    rounding = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    assert ((out - exact).abs() <= exact.abs() * rounding + 1e-6).all()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


def test_both_are_one_graph():
    def merged(outs, lses, sink):
        return with_sink(*merge_attention(outs, lses), sink)

    outs, lses = parts()
    arguments = (list(outs), list(lses), torch.randn(3, 1, dtype=torch.float64))
    compiled = torch.compile(merged, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), merged(*arguments))


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


OUT, LSE = zeros(2, 3, 5, 4), zeros(2, 3, 5)
BAD_PARTS = [
    (OUT, LSE, TypeError, "outs must be a list or tuple of tensors, got Tensor"),
    ([], [], ValueError, "at least 1, got 0 and 0"),
    ([OUT, OUT], [LSE], ValueError, "same number of parts, at least 1, got 2 and 1"),
    ([OUT, None], [LSE, LSE], TypeError, r"outs\[1\] must be a tensor, got NoneType"),
    ([OUT, OUT.double()], [LSE, LSE], TypeError, r"outs\[1\] must be torch.float32, got"),
    ([OUT, OUT[:, :1]], [LSE, LSE[:, :1]], ValueError, r"outs\[1\] must have shape \[2, 3, 5, 4\]"),
    ([OUT], [LSE[..., None]], ValueError, r"lses\[0\] must have shape \[2, 3, 5\], got"),
    ([OUT], [LSE.bfloat16()], TypeError, r"lses\[0\] must be torch.float32 or torch.float64"),
    ([OUT], [LSE.to("meta")], ValueError, r"lses\[0\] must be on cpu, got meta"),
    ([OUT[0]], [LSE[0]], ValueError, r"outs\[0\] must have shape \[B, H, Tq, Dv\], got"),
]
BAD_SINKS = [
    (0.0, TypeError, "sink must be a tensor, got float"),
    (zeros(3), ValueError, r"sink must broadcast to \[2, 3, 5\], got \[3\]"),
    (zeros(3, 1, dtype=torch.int64), TypeError, "sink must be torch.float32"),
    (zeros(3, 1, device="meta"), ValueError, "sink must be on cpu, got meta"),
]


@pytest.mark.parametrize(("outs", "lses", "error", "message"), BAD_PARTS)
def test_bad_parts_are_named(outs, lses, error, message):
    with pytest.raises(error, match=f"^merge_attention: .*{message}"):
        merge_attention(outs, lses)


@pytest.mark.parametrize(("sink", "error", "message"), BAD_SINKS)
def test_bad_sinks_are_named(sink, error, message):
    with pytest.raises(error, match=f"^with_sink: {message}"):
        with_sink(OUT, LSE, sink)
