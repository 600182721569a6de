"""`patch`, `unpatch`, `report` and `patched` on classes with the parameters of a Parakeet
attention, which needs no other library."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from transformer_xl.integrations import families, parakeet, patch, patched, report, unpatch
from transformer_xl.integrations.adapter import Adapter, adapter_of, always

D, H = 12, 3
LOAD = Adapter.load
LOOKALIKE = parakeet.Lookalike(parakeet.PARAMETERS, parakeet.example)


class Attention(nn.Module):
    """The convention of Parakeet's attention, written out."""

    is_shifted = True

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation="eager")
        self.head_dim, self.scaling, self.attention_dropout = D // H, (D // H) ** -0.5, 0.0
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(D, D))
        self.relative_k_proj = nn.Linear(D, D, bias=False)
        self.bias_u, self.bias_v = (nn.Parameter(torch.randn(H, D // H)) for _ in range(2))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        attention_mask: Tensor | None = None,
        **options: object,
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (H, -1)).transpose(1, 2)

        T = hidden_states.shape[1]
        q, k, v = (heads(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
        r = heads(self.relative_k_proj(position_embeddings))
        positions = (q + self.bias_v[:, None]) @ r.mT  # [B, H, T, 2T - 1]
        if self.is_shifted:
            row = torch.arange(T) - torch.arange(T)[:, None] + T - 1
            positions = positions.gather(3, row.expand(*positions.shape[:2], T, T))
        scores = ((q + self.bias_u[:, None]) @ k.mT + positions[..., :T]) * self.scaling
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        probs = scores.softmax(-1)
        return self.o_proj((probs @ v).transpose(1, 2).flatten(2)), probs


class Unshifted(Attention):
    """The same parameters and another formula, as WeNet's classes have."""

    is_shifted = False


class Model(nn.Module):
    def __init__(self, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(attention() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
        T = x.shape[1]
        table = torch.sin(torch.arange(T - 1, -T, -1)[:, None] / 1.7 ** torch.arange(D)).to(x)
        for layer in self.layers:
            x = x + layer(x, table.expand(len(x), -1, -1), mask, **options)[0]
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    yield Model()
    unpatch()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1))


def outcome(model: nn.Module, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(x, mask)
    out.square().mean().backward()
    return {"out": out.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)


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


def sharded(model: nn.Module) -> nn.Module:
    layer = model.layers[0]
    layer.__class__ = type("FSDPAttention", (FSDPModule, type(layer)), {})  # as fully_shard does
    return model


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


def test_an_unknown_model_or_family_lists_the_families():
    for target in (nn.Linear(2, 2), "parakeets"):
        with pytest.raises(ValueError, match="inkling, inkling2, parakeet, nemotron_streaming"):
            patch(target)


@pytest.fixture
def family(monkeypatch) -> str:
    """A family with a class of this file."""
    path = f"{Attention.__module__}.Attention"
    monkeypatch.setattr(Adapter, "load", lambda self: Attention)
    adapter = Adapter("test", path, ((2, 0), (2, 3)), always(parakeet.attention), parakeet.unserved)
    monkeypatch.setitem(families.FAMILIES, "test", (adapter,))
    yield "test"
    unpatch("test")


def test_a_version_that_was_not_checked_needs_force(family, monkeypatch, model):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.4.1")
    for target in (family, model):
        with pytest.raises(
            ValueError, match=r"checked with .* 2\.0 to 2\.3, got .* 2\.4\.1; force"
        ):
            patch(target)
    assert len(patch(model, force=True).patched) == 2
    unpatch(model)
    assert patch(family, force=True).patched


def test_a_family_is_patched_for_all_its_instances(family, monkeypatch, model, x):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.1.0")
    expected, forward = outcome(model, x), Attention.forward
    assert len(patch(family).patched) == 1
    patch(family)
    check_equal(outcome(model, x), expected)
    assert adapter_of(model.layers[0]) is not None
    assert type(model.layers[0]) is Attention
    assert adapter_of(Attention()) is not None
    assert len(patch(model).patched) == 2  # both at once
    check_equal(outcome(model, x), expected)
    assert not unpatch(family).patched
    assert Attention.forward is forward
    assert adapter_of(model.layers[0]) is None


@pytest.mark.parametrize("has_own_forward", [False, True], ids=["", "own_forward"])
def test_a_derived_class_may_have_the_name_of_the_library_s(family, x, has_own_forward):
    def forward(self, *args: object, **options: object) -> tuple[Tensor, None]:
        return 2 * Attention.forward(self, *args, **options)[0], None

    members = {"__module__": "elsewhere", **({"forward": forward} if has_own_forward else {})}
    model = Model(type("Attention", (Attention,), members))
    expected = outcome(model, x)
    found = patch(model, force=True)
    assert len(found.patched) == (0 if has_own_forward else 2)
    assert has_own_forward == ("another forward than Attention" in str(found))
    check_equal(outcome(model, x), expected)


class Derived(Attention):
    """Inherits the forward, which reads other attributes."""

    is_shifted = False


class Scaled(Attention):
    """Calls the forward of its base."""

    def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Any]:
        out, probs = super().forward(*args, **options)
        return 2 * out, probs


@pytest.fixture
def lookalike_family(family, monkeypatch) -> str:
    adapter = dataclasses.replace(families.FAMILIES[family][0], lookalike=LOOKALIKE)
    monkeypatch.setitem(families.FAMILIES, family, (adapter,))
    return family


@pytest.mark.parametrize("kind", [Derived, Scaled])
def test_a_family_s_derived_classes_are_compared_once(lookalike_family, monkeypatch, x, kind):
    compared = []
    example = LOOKALIKE.example
    counting = parakeet.Lookalike(
        parakeet.PARAMETERS, lambda module: compared.append(1) or example(module)
    )
    adapter = dataclasses.replace(families.FAMILIES[lookalike_family][0], lookalike=counting)
    monkeypatch.setitem(families.FAMILIES, lookalike_family, (adapter,))
    model = Model(kind)
    expected = outcome(model, x)
    patch(lookalike_family, force=True)
    for _ in range(3):
        check_equal(outcome(model, x), expected)
    assert len(compared) == 2  # modules
    calls = report(lookalike_family).entries[0].fallbacks
    assert sum(calls.values()) == (6 if kind is Derived else 0)
    assert all("another result" in why for why in calls)
    assert not report(model).patched


def test_the_class_that_fully_shard_makes_is_not_compared(lookalike_family, x):
    model = Model()
    expected = model(x)
    patch(lookalike_family, force=True)
    torch.testing.assert_close(sharded(model)(x), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert report(lookalike_family).fallbacks == 0


@pytest.mark.parametrize("error", [ImportError("no libcudart"), AttributeError("no attribute")])
def test_a_family_is_patched_as_a_whole_or_not_at_all(family, monkeypatch, error):
    other = dataclasses.replace(families.FAMILIES[family][0], path="elsewhere.Attention")
    monkeypatch.setitem(families.FAMILIES, family, (*families.FAMILIES[family], other))

    def load(name: str) -> Any:
        if name == "elsewhere":
            raise error
        return sys.modules[name]

    monkeypatch.setattr(Adapter, "load", LOAD)
    monkeypatch.setattr("importlib.import_module", load)
    forward = Attention.forward
    with pytest.raises(ValueError, match=f"the family test could not be imported: {error}"):
        patch(family, force=True)
    assert Attention.forward is forward


def test_a_call_is_counted_for_its_own_adapter(family, monkeypatch, x):
    """A class that is derived from another one may have an adapter of its own."""
    base = families.FAMILIES[family][0]
    derived = dataclasses.replace(base, path=f"{Scaled.__module__}.Scaled")
    monkeypatch.setitem(families.FAMILIES, family, (base, derived))
    found = {base.path: Attention, derived.path: Scaled}
    monkeypatch.setattr(Adapter, "load", lambda self: found[self.path])
    patch(family, force=True)
    module = Scaled()
    module(x, torch.randn(2, 17, D), output_attentions=True)
    own, other = (sum(entry.fallbacks.values()) for entry in report(family).entries)
    assert (own, other) == (1, 1)


def test_the_documents_name_every_family():
    root = Path(__file__).resolve().parents[3]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r'patch\("(\w+)"\)', readme)) == set(families.FAMILIES)
    page = (root / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z0-9_]+)` \|", page, flags=re.M) == list(families.FAMILIES)
    for adapter in sum(families.FAMILIES.values(), ()):
        first, last = (".".join(map(str, version)) for version in adapter.versions)
        assert first == last
        assert f"{adapter.library} {first}" in page
