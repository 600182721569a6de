"""Which classes found by their parameters are compared, and what a comparison depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transformer_xl.integrations import espnet, families, patch, report, unpatch
from transformer_xl.integrations.adapter import Adapter, Lookalike, always

H, D = 2, 4


class Attention(nn.Module):
    """ESPnet's, with an attribute that its formula depends on."""

    sign, is_broken = 1.0, False

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "out", "pos"):
            setattr(self, f"linear_{name}", nn.Linear(H * D, H * D, bias=name != "pos"))
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(torch.randn(H, D)) for _ in range(2))
        self.dropout = nn.Dropout(0.0)

    def forward_qkv(self, *x: Tensor) -> list[Tensor]:
        layers = (self.linear_q, self.linear_k, self.linear_v)
        return [heads(layer(y)) for layer, y in zip(layers, x, strict=True)]

    @staticmethod
    def rel_shift(positions: Tensor) -> Tensor:
        T = positions.shape[2]
        row = torch.arange(T) - torch.arange(T)[:, None] + T - 1
        return positions.gather(3, row.expand(*positions.shape[:2], T, T))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Tensor | None
    ) -> Tensor:
        if self.is_broken:
            raise RuntimeError("not loaded yet")
        q, k, v = self.forward_qkv(query, key, value)
        positions = (q + self.pos_bias_v[:, None]) @ heads(self.linear_pos(pos_emb)).mT
        positions = self.rel_shift(positions)
        scores = ((q + self.pos_bias_u[:, None]) @ k.mT + self.sign * positions) * D**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -1e9)
        return self.linear_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, query, key, value, pos_emb, mask):
        return self.attend(query, key, value, pos_emb, mask)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (H, D)).transpose(1, 2)


@pytest.fixture(autouse=True)
def own_code_afterwards():
    yield
    unpatch()


class Optional(Attention):
    def forward(self, query, key, value, pos_emb, mask=None):
        return self.attend(query, key, value, pos_emb, mask)


class OtherDefault(Attention):
    def forward(self, query, key, value, pos_emb, mask=False):
        return self.attend(query, key, value, pos_emb, None if mask is False else mask)


class KeywordOnly(Attention):
    def forward(self, query, key, value, pos_emb, mask, *, scale=1.0):
        return scale * self.attend(query, key, value, pos_emb, mask)


class Options(Attention):
    def forward(self, query, key, value, pos_emb, mask=None, **options: Any):
        return options.get("scale", 1.0) * self.attend(query, key, value, pos_emb, mask)


class More(Attention):
    def forward(self, query, key, value, pos_emb, mask=None, *more: Any):
        return self.attend(query, key, value, pos_emb, mask)


def test_a_class_must_have_arguments_and_defaults_of_the_adapter():
    for kind in (Attention, Optional):
        assert patch(kind()).patched
    for kind in (OtherDefault, KeywordOnly, Options, More):
        reason = patch(kind()).left_alone[0].reason
        assert "other arguments (query, key, value, pos_emb, " in reason, kind


def test_a_comparison_belongs_to_the_class_that_the_module_has():
    class Negative(Attention):
        sign = -1.0

    module = Attention()
    assert patch(module).patched
    unpatch(module)
    module.__class__ = Negative
    assert "another result" in patch(module).left_alone[0].reason


def test_a_failed_call_is_compared_again():
    module = Attention()
    module.is_broken = True
    assert "a call failed: not loaded yet" in patch(module).left_alone[0].reason
    module.is_broken = False
    assert patch(module).patched


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["device", "dtype", "autocast"])
def test_a_comparison_depends_on_no_global_state(kind):
    module = Attention()
    contexts = {
        "device": torch.device("meta"),
        "dtype": default_dtype(torch.float16),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
    }
    with contexts[kind]:
        found = patch(module)
        assert torch.get_default_dtype() == (torch.float16 if kind == "dtype" else torch.float32)
    assert found.patched, str(found)


@pytest.fixture
def make_family(monkeypatch) -> Callable[[Lookalike | None], str]:
    """A function that makes a family of the class above, with or without an example."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    monkeypatch.setattr(Adapter, "load", lambda self: Attention)
    path = f"{Attention.__module__}.Attention"

    def make(lookalike: Lookalike | None) -> str:
        build = always(espnet.attention)
        adapter = Adapter("test", path, ((1,), (1,)), build, espnet._unserved, lookalike=lookalike)
        monkeypatch.setitem(families.FAMILIES, "test", (adapter,))
        return "test"

    yield make
    unpatch("test")


def call(module: nn.Module) -> Tensor:
    torch.manual_seed(0)
    x, table = torch.randn(2, 7, H * D), torch.randn(1, 13, H * D)
    with torch.no_grad():
        return module(x, x, x, table, None)


class WithOtherHelper(Attention):
    def forward_qkv(self, *x: Tensor) -> list[Tensor]:
        return [2 * y for y in super().forward_qkv(*x)]


class WithOtherStaticHelper(Attention):
    @staticmethod
    def rel_shift(positions: Tensor) -> Tensor:
        return 2 * Attention.rel_shift(positions)


class WithOtherMethods(Attention):
    """Its forward calls none of them."""

    def reset(self) -> None:
        pass

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(mode)


@pytest.mark.parametrize(
    ("kind", "helper"), [(WithOtherHelper, "forward_qkv"), (WithOtherStaticHelper, "rel_shift")]
)
@pytest.mark.parametrize("by_name", [True, False], ids=["family", "model"])
def test_without_an_example_a_derived_class_with_another_helper_is_left_alone(
    make_family, by_name, kind, helper
):
    family, reason = make_family(None), f"its class has another {helper} than Attention"
    module, same = kind(), WithOtherMethods()
    expected, expected_same = call(module), call(same)
    for target in (family,) if by_name else (module, same):
        patch(target)
    assert torch.equal(call(module), expected)
    assert not torch.equal(call(same), expected_same)  # rounding: the kernels were used
    torch.testing.assert_close(call(same), expected_same)
    if by_name:
        assert torch.equal(call(torch.compile(module, backend="eager", fullgraph=True)), expected)
        torch.compile(same, backend="eager", fullgraph=True)(*[torch.ones(1, 1, H * D)] * 4, None)
        assert report(family).entries[0].fallbacks == {reason: 1}
    assert {entry.reason for entry in (*report(module).entries, *report(same).entries)} == {
        "",
        reason,
    }


def test_a_compiled_module_of_a_derived_class_runs_its_own_code_and_is_reported(make_family):
    family = make_family(Lookalike(espnet.PARAMETERS, espnet.example))
    module = type("Copy", (Attention,), {})()
    expected = call(module)
    patch(family)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(call(compiled), expected)
    fallbacks = {"Copy is a derived class, which is not compared while compiling": 1}
    assert report(family).entries[0].fallbacks == fallbacks
    assert report(module).entries[0].fallbacks == fallbacks
    assert not torch.equal(call(module), expected)  # rounding: the kernels were used
    unpatch(family)
    assert report(family).fallbacks == 0
