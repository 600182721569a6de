"""Prints the table of docs/integrations.md: the errors of each patched class.

    python tests/transformer_xl/integrations/dropins/errors.py

An error is |patched - original| / |original|, both float32: of the hidden states of valid frames,
and the largest one of all parameters' gradients (those of almost 0 relative to the largest).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

from transformer_xl.integrations import patch

spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("conftest.py"))
assert spec is not None
assert spec.loader is not None
models = importlib.util.module_from_spec(spec)
sys.modules["models"] = models
spec.loader.exec_module(models)


def errors(name: str) -> tuple[float, float]:
    model = models.build(name)
    kwargs, valid = models.CASES[name].inputs([21, 13, 18])
    expected = models.results(model, kwargs, valid)
    patch(model)
    actual = models.results(model, kwargs, valid)
    largest = max(float(x.norm()) for x in expected.values())

    def error(key: str, x: Tensor) -> float:
        least = 0.0 if key == "out" else 1e-2 * largest
        return float((actual[key] - x).norm()) / (float(x.norm()) + least)

    gradients = (error(key, x) for key, x in expected.items() if key != "out")
    return error("out", expected["out"]), max(gradients)


def main() -> None:
    torch.manual_seed(0)
    version = importlib.metadata.version("transformers")
    for name, case in models.CASES.items():
        forward, gradient = errors(name)
        names = f"`{case.path[1]}`, {case.implementation} | {version}"
        print(f"| {names} | {forward:.0e} | {gradient:.0e} |")


if __name__ == "__main__":
    main()
