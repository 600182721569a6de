"""When a run computes in bfloat16."""

from __future__ import annotations

import pytest
import torch

from transformer_xl.training import precision
from transformer_xl.training.precision import autocast, cpu_flags, processor, uses_bf16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f"}, False),
        ({"avx512f", "avx512_bf16"}, True),
        ({"amx_tile", "amx_bf16"}, True),
        (set(), False),
    ],
)
def test_auto_goes_by_the_processor(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], expected: bool
) -> None:
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(flags))
    assert uses_bf16("auto", CPU) is expected
    assert uses_bf16("bf16", CPU)
    assert not uses_bf16("off", CPU)


def test_products_follow() -> None:
    matrix = torch.eye(4)
    with autocast("bf16", CPU):
        assert (matrix @ matrix).dtype == torch.bfloat16
    with autocast("off", CPU):
        assert (matrix @ matrix).dtype == torch.float32


def test_the_processor_is_known() -> None:
    assert processor()
    assert all(flag == flag.strip() for flag in cpu_flags())


@pytest.mark.parametrize("field", ["flags", "Features"])
def test_features_are_read_on_both_processors(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setattr(precision, "_cpuinfo", lambda name: "fma bf16" if name == field else "")
    assert cpu_flags() == {"fma", "bf16"}
