"""`patch`, `unpatch`, `report` and `patched` on models."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from transformer_xl.integrations import patch, patched, report, unpatch

from .parakeet_like import Attention, D, Model, Unshifted, check_equal, outcome, sharded


def test_a_class_found_by_its_parameters_gives_equal_results(model, x):
    mask = torch.arange(9) < torch.tensor([9, 6])[:, None, None, None]
    expected = outcome(model, x), outcome(model, x, mask)
    found = patch(model)
    assert [entry.name for entry in found.patched] == ["layers.0", "layers.1"]
    check_equal(outcome(model, x), expected[0])
    check_equal(outcome(model, x, mask), expected[1])
    assert report(model).fallbacks == 0


def test_a_class_with_another_result_is_left_alone(x):
    model = Model(Unshifted)
    expected = model(x)
    found = patch(model)
    assert not found.patched
    assert "another result" in found.left_alone[0].reason
    assert torch.equal(model(x), expected)


def test_the_comparison_does_not_change_the_random_numbers(model):
    torch.manual_seed(5)
    patch(model)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_patching_twice_equals_once_and_unpatch_restores_everything(model, x):
    layer, forward = model.layers[0], Attention.forward
    before, parameters = dict(layer.__dict__), list(model.parameters())
    keys, signature = list(model.state_dict()), inspect.signature(layer.forward)
    patch(model)
    once = type(layer)
    assert str(patch(model)) == str(report(model))
    assert type(layer) is once
    assert isinstance(layer, Attention)
    assert once.__name__ == "Attention"
    assert list(model.state_dict()) == keys
    assert inspect.signature(layer.forward) == signature
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    unpatch(model)
    assert type(layer) is Attention
    assert Attention.forward is forward
    assert layer.__dict__ == before
    assert not report(model).patched
    assert not report().entries


def test_calls_that_are_not_served_are_counted_but_not_while_compiling(model, x, monkeypatch):
    own = model.layers[0]
    table = torch.randn(2, 17, D)
    expected = own(x, table)[1]
    patch(model)
    assert torch.equal(own(x, table, output_attentions=True)[1], expected)
    numbers = torch.zeros(2, 1, 9, 9)
    with pytest.raises(TypeError):  # the restatement does not accept such a mask either
        own(x, table, numbers)
    reasons = report(model).entries[0].fallbacks
    assert reasons == {
        "attention weights are requested": 1,
        "the mask has numbers, which are added to the scores": 1,
    }
    assert "1 calls ran the original code: attention weights" in str(report(model))
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    model(x, output_attentions=True)
    assert report(model).fallbacks == 2


def test_copies_pickles_and_moves_stay_patched(model, x):
    patch(model)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        copy.deepcopy(model).double().to("cpu").float(),
    ]
    for other in copies:
        assert len(report(other).patched) == 2
        torch.testing.assert_close(other(x), expected)
        assert not unpatch(other).patched
        torch.testing.assert_close(other(x), expected)
    assert len(report(model).patched) == 2


def test_patched_restores_the_model_also_after_an_error(model):
    def fail() -> None:
        with patched(model) as found:
            assert len(found.patched) == 2
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert type(model.layers[0]) is Attention
    patch(model.layers[1])
    with patched(model):
        pass
    assert [entry.patched for entry in report(model).entries] == [False, True]


def test_a_replaced_forward_is_left_alone(model):
    model.layers[0].forward = model.layers[0].forward
    found = patch(model)
    assert [entry.patched for entry in found.entries] == [False, True]
    assert "replaced its forward" in found.left_alone[0].reason


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.layers[0].compile(backend="eager")
    return model


def wrapped(wrapper: type[nn.Module], child: str) -> Callable[[nn.Module], nn.Module]:
    """A wrapper without its process group; child: its name of the model inside."""

    def wrap(model: nn.Module) -> nn.Module:
        outer = wrapper.__new__(wrapper)
        nn.Module.__init__(outer)
        outer._modules[child] = model
        return outer

    return wrap


LATER = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "torch.compile, got": compiled_in_place,
    "DistributedDataParallel": wrapped(DistributedDataParallel, "module"),
    "FSDP": wrapped(FullyShardedDataParallel, "_fsdp_wrapped_module"),
    "fully_shard": sharded,
}


@pytest.mark.parametrize("is_patched", [False, True], ids=["", "patched"])
@pytest.mark.parametrize("name", LATER)
def test_wrappers_and_compiled_models_come_after_patch(model, name, is_patched):
    if is_patched:
        patch(model)
    later = LATER[name](model)
    before = [type(module) for module in model.modules()]
    for function in (patch, unpatch):
        with pytest.raises(ValueError, match=f"{function.__name__}: .* before {re.escape(name)}"):
            function(later)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("is_patched_first", [True, False], ids=["patch_first", "move_first"])
def test_models_may_be_moved_before_and_after(model, x, is_patched_first):
    expected = model(x)
    if is_patched_first:
        patch(model)
    model.to(torch.float64)
    patch(model)
    actual = model(x.double())
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.float(), expected)
    assert len(report(model).patched) == 2
