"""A call of rel_attention like an earlier one runs by its plan; other calls do not."""

from __future__ import annotations

import pytest
import torch

from txl_kernels import rel_attention, rel_attention_with_lse
from txl_kernels.ops import rel_attention_plans as plans
from txl_kernels.testing import RelAttentionCase

CASE = RelAttentionCase("", Hk=1, Dp=5, q_start=[3, 5], key_start=[0, 9])


@pytest.fixture(autouse=True)
def _native(require_backend):
    require_backend("rel_attention", "native", needs_grad=True)


@pytest.fixture
def runs(monkeypatch):
    """The number of calls that ran by a plan, as the length of a list."""
    found, get = [], plans.get

    def recorded(key):
        plan = get(key)
        if plan is not None:
            found.append(plan)
        return plan

    monkeypatch.setattr(plans, "get", recorded)
    plans.clear()
    return found


def inputs():
    floats, others = CASE.inputs(torch.float32)
    return {name: x.detach() for name, x in floats.items()} | others


@pytest.mark.parametrize("given", [(), ("q",), ("mem_k", "r_r_bias")], ids=str)
def test_equal_to_the_first_call_with_gradients(runs, given):
    call = inputs()
    leaves = [call[name].requires_grad_() for name in given]
    first, second = (rel_attention_with_lse(**call, causal=True) for _ in range(2))
    assert len(runs) == 1
    for x, due in zip(second, first, strict=True):
        assert torch.equal(x, due)
        assert x.requires_grad == bool(given)
    if given:
        actual, due = (torch.autograd.grad(out.sum(), leaves) for out, _ in (second, first))
        assert all(map(torch.equal, actual, due))


def test_without_gradients_the_result_may_enter_a_graph(runs):
    call = inputs()
    weight = torch.ones((), requires_grad=True)
    with torch.no_grad():
        outs = [rel_attention(**call) for _ in range(2)]
    assert len(runs) == 1
    (weight * outs[1]).sum().backward()
    assert weight.grad == outs[0].sum()


def test_a_planned_call_skips_the_operators_autograd_kernel(runs):
    """That kernel is Python and takes longer than a small call."""
    call = inputs()
    for needs_grad in (False, True):
        call["q"].requires_grad_(needs_grad)
        first, second = (events(call) for _ in range(2))
        assert (
            "GeneratedBackwardFor_txl_native_rel_attention_fwd_default" in first or not needs_grad
        )
        assert not any("GeneratedBackward" in name for name in second)
        assert "txl_native::rel_attention_fwd" in second
    assert len(runs) == 2


def events(call):
    """The names of the operators and autograd functions of a call and its gradient."""
    with torch.profiler.profile() as profile:
        out = rel_attention(**call)
        if out.requires_grad:
            out.sum().backward()
    return {event.name for event in profile.events()}


def test_only_lse_has_a_gradient_and_a_second_derivative_is_an_error(runs):
    call = inputs()
    k = call["k"].requires_grad_()
    first, second = (rel_attention_with_lse(**call)[1].sum() for _ in range(2))
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
def test_another_call_has_no_plan(runs, name):
    call = inputs()
    rel_attention(**call)
    other = call | OTHER[name](call)
    rel_attention(**other)
    assert not runs
    if name in ("rows to copy", "a mask", "dropout", "the reference"):
        rel_attention(**other)
        assert not runs


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
    assert len(runs) == 1  # under the default device
