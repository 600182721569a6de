"""The functions of docs/mappings.md, and their comparison with the class that each replaces."""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from txl_kernels.testing import check_budget

PAGE = Path(__file__).resolve().parents[3] / "docs" / "mappings.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.M | re.S)
Inputs = dict[str, Any]


def page() -> types.SimpleNamespace:
    """The blocks of the page, run as one program."""
    names: dict[str, Any] = {}
    exec("\n".join(BLOCKS), names)
    return types.SimpleNamespace(**names)


def results(
    function: Callable[..., Tensor], module: nn.Module, inputs: Inputs, valid: Any = ...
) -> dict[str, Tensor]:
    """The valid part of the output, and its gradients in all parameters and inputs."""
    module.zero_grad()
    inputs = {name: _leaf(x) for name, x in inputs.items()}
    out = function(module, **inputs)[valid]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    leaves = [*module.named_parameters(), *inputs.items()]
    grads = {f"d{n}": x.grad for n, x in leaves if isinstance(x, Tensor) and x.grad is not None}
    return {"out": out.detach(), **{name: x.clone() for name, x in grads.items()}}


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """|actual - expected| / |expected| of the output, and the largest one of the gradients.

    A gradient of almost 0, such as that of the bias of the keys, counts relative to the largest.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-2 * max(float(x.double().norm()) for x in expected.values())

    def error(name: str, least: float) -> float:
        x = expected[name].double()
        return float((actual[name].double() - x).norm()) / (float(x.norm()) + least)

    return error("out", 0.0), max(error(name, floor) for name in expected if name != "out")


def compare(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    module: nn.Module,
    inputs: Inputs,
    valid: Any = ...,
) -> tuple[float, float]:
    """The errors of `ours` relative to `theirs`, after a check that they are within the budget."""
    exact = results(ours, copy.deepcopy(module).double(), converted(inputs, torch.float64), valid)
    expected = results(theirs, module, inputs, valid)
    actual = results(ours, module, inputs, valid)
    assert max(errors(expected, exact)) < 1e-5, "another function than the class"
    largest = max(float(x.abs().max()) for x in exact.values())
    for name, x in exact.items():
        magnitude = max(float(x.abs().max()), 1e-2 * largest)  # a gradient may cancel to 0
        options = {"dtype": torch.float32, "magnitude": magnitude, "is_sum": name != "out"}
        check_budget(name, actual[name], x, expected[name], **options)
    return errors(actual, expected)


def converted(x: Any, dtype: torch.dtype) -> Any:
    """All floating-point tensors in dictionaries, lists and tuples."""
    if isinstance(x, dict):
        return {name: converted(y, dtype) for name, y in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(converted(y, dtype) for y in x)
    return x.to(dtype) if _is_float(x) else x


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _leaf(x: Any) -> Any:
    return x.detach().clone().requires_grad_() if _is_float(x) else x


class Mappings:
    """The functions of this file, for tests."""

    page, text, blocks = page(), TEXT, BLOCKS
    compare, converted = staticmethod(compare), staticmethod(converted)


@pytest.fixture
def mappings() -> type[Mappings]:
    return Mappings
