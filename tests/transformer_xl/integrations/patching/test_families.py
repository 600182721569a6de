"""`patch` on families: all instances of their classes, and of classes derived from these."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import families, parakeet, patch, report, unpatch
from transformer_xl.integrations.adapter import Adapter, adapter_of, always

from .parakeet_like import Attention, D, Model, check_equal, outcome, sharded

LOAD = Adapter.load
LOOKALIKE = parakeet.Lookalike(parakeet.PARAMETERS, parakeet.example)


def test_an_unknown_model_or_family_lists_the_families():
    for target in (nn.Linear(2, 2), "parakeets"):
        with pytest.raises(ValueError, match="inkling, inkling2, parakeet, nemotron_streaming"):
            patch(target)


@pytest.fixture
def family(monkeypatch) -> str:
    """A family whose class is in parakeet_like.py."""
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
    root = Path(__file__).resolve().parents[4]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r'patch\("(\w+)"\)', readme)) == set(families.FAMILIES)
    page = (root / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z0-9_]+)` \|", page, flags=re.M) == list(families.FAMILIES)
    for adapter in sum(families.FAMILIES.values(), ()):
        first, last = (".".join(map(str, version)) for version in adapter.versions)
        assert first == last
        assert f"{adapter.library} {first}" in page
