"""Eager calls of rel_attention on a CPU run by a plan, equal calls by the same one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from txl_kernels import rel_attention, rel_attention_with_lse
from txl_kernels.ops import rel_attention_plans as plans
from txl_kernels.testing import RelAttentionCase

CASE = RelAttentionCase("", Hk=1, Dp=5, q_start=[3, 5], key_start=[0, 9])


@pytest.fixture(autouse=True)
def _native(require_backend):
    require_backend("rel_attention", "native", needs_grad=True)


@pytest.fixture
def runs(monkeypatch):
    """The plans that calls run by, in order."""
    found, run = [], plans.Plan.run

    def recorded(plan, tensors):
        found.append(plan)
        return run(plan, tensors)

    monkeypatch.setattr(plans.Plan, "run", recorded)
    plans.clear()
    return found


def without_plan(**call):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plans, "key", lambda *_: None)
        return rel_attention_with_lse(**call)


def inputs():
    floats, others = CASE.inputs(torch.float32)
    return {name: x.detach() for name, x in floats.items()} | others


@pytest.mark.parametrize("given", [(), ("q",), ("mem_k", "r_r_bias")], ids=str)
def test_equal_to_a_call_without_plan_with_gradients(runs, given):
    call = inputs()
    leaves = [call[name].requires_grad_() for name in given]
    expected = without_plan(**call, causal=True)
    assert not runs
    for _ in range(2):
        actual = rel_attention_with_lse(**call, causal=True)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)
            assert x.requires_grad == bool(given)
        if given:
            found, due = (
                torch.autograd.grad(out.sum(), leaves, retain_graph=True)
                for out, _ in (actual, expected)
            )
            assert all(map(torch.equal, found, due))
    assert len(runs) == 2
    assert runs[0] is runs[1]


def test_gradient_checkpointing_repeats_the_first_call(runs):
    call = inputs()
    k = call["k"].requires_grad_()
    out = checkpoint(lambda: rel_attention(**call), use_reentrant=False)
    (actual,) = torch.autograd.grad(out.sum(), k)
    (expected,) = torch.autograd.grad(without_plan(**call)[0].sum(), k)
    assert torch.equal(actual, expected)
    assert len(runs) == 2


def test_without_gradients_the_result_may_enter_a_graph(runs):
    call = inputs()
    weight = torch.ones((), requires_grad=True)
    with torch.no_grad():
        outs = [rel_attention(**call) for _ in range(2)]
    assert len(runs) == 2
    (weight * outs[1]).sum().backward()
    assert weight.grad == outs[0].sum()


def test_a_planned_call_skips_the_operators_autograd_kernel(runs):
    """That kernel is Python and takes longer than a small call."""
    call = inputs()
    for needs_grad in (False, True):
        call["q"].requires_grad_(needs_grad)
        unplanned, planned = events(without_plan, call), events(rel_attention_with_lse, call)
        name = "GeneratedBackwardFor_txl_native_rel_attention_fwd_default"
        assert name in unplanned or not needs_grad
        assert not any("GeneratedBackward" in name for name in planned)
        assert "txl_native::rel_attention_fwd" in planned
    assert len(runs) == 2


def events(function, call):
    """The names of the operators and autograd functions of a call and its gradient."""
    with torch.profiler.profile() as profile:
        out = function(**call)[0]
        if out.requires_grad:
            out.sum().backward()
    return {event.name for event in profile.events()}


def test_only_lse_has_a_gradient_and_a_second_derivative_is_an_error(runs):
    call = inputs()
    k = call["k"].requires_grad_()
    first, second = without_plan(**call)[1].sum(), rel_attention_with_lse(**call)[1].sum()
    due, actual = (torch.autograd.grad(lse, k, retain_graph=True)[0] for lse in (first, second))
    assert len(runs) == 1
    assert torch.equal(actual, due)
    (dk,) = torch.autograd.grad(second, k, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dk.sum().backward()


OTHER = {
    "another value": lambda call: {"scale": 0.1},
    "another type": lambda call: {"causal": True, "window": (1, 0)},
    "another shape": lambda call: {"key_start": torch.tensor([[0] * 17] * 2)},
    "another dtype": lambda call: {"q_start": call["q_start"].int()},
    "rows to copy": lambda call: {"r": call["r"].mT.contiguous().mT},
    "a gradient": lambda call: {"v": call["v"].clone().requires_grad_()},
    "a mask": lambda call: {"mask": torch.ones(22, dtype=torch.bool)},
    "dropout": lambda call: {"dropout_p": 0.5},
    "the reference": lambda call: {"backend": "reference"},
}


@pytest.mark.parametrize("name", OTHER)
def test_another_call_has_another_plan_or_none(runs, name):
    call = inputs()
    rel_attention(**call)
    rel_attention(**call | OTHER[name](call))
    if name in ("rows to copy", "a mask", "dropout", "the reference"):
        assert len(runs) == 1
    else:
        first, second = runs
        assert first is not second


@pytest.mark.parametrize(
    "wrong", [{"clamp": 0}, {"offset": 3.0}, {"window": (1.0, None)}, {"causal": 1}], ids=str
)
def test_equal_values_of_another_type_are_still_an_error(runs, wrong):
    options = {"offset": 3, "clamp": False, "window": (1, None), "causal": True}
    call = inputs()
    rel_attention(**call, **options)
    with pytest.raises(TypeError, match="rel_attention: "):
        rel_attention(**call, **options | wrong)


def test_no_plan_where_torch_changes_the_call(runs):
    call = inputs()
    rel_attention(**call)
    with torch.autocast("cpu", torch.bfloat16):
        assert rel_attention(**call).dtype == torch.bfloat16
    batched = torch.func.vmap(lambda q: rel_attention(**call | {"q": q}))(call["q"][None])
    with torch.device("meta"):
        assert torch.equal(rel_attention(**call), batched[0])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert type(rel_attention(**call)) is not torch.Tensor
    torch.jit.trace(lambda q: rel_attention(**call | {"q": q}), call["q"], check_trace=False)
    assert len(runs) == 2  # without any mode, and under the default device
