"""The functions of docs/mappings.md against the classes of the packages."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).with_name("mapping_classes.py")
spec = importlib.util.spec_from_file_location("mapping_classes", PATH)
assert spec is not None
assert spec.loader is not None
classes = importlib.util.module_from_spec(spec)
sys.modules["mapping_classes"] = classes
spec.loader.exec_module(classes)


def case_of(row):
    if row.package == "transformers":
        pytest.importorskip("transformers", minversion="5.24")
    elif importlib.util.find_spec(row.package.replace("-", "_")) is None:
        pytest.skip(f"{row.package} is not installed")
    return classes.case_of(row)


@pytest.fixture(params=classes.ROWS, ids=lambda row: row.case.__name__)
def row(request):
    return request.param


def test_forward_and_gradients(mappings, row):
    m, inputs, theirs, valid = case_of(row)
    mappings.compare(getattr(mappings.page, row.function), theirs, m, inputs, valid)


def test_the_second_block_of_funnel(mappings):
    row = next(row for row in classes.ROWS if row.case is classes.funnel)
    m, inputs, theirs, valid = case_of(row._replace(case=lambda: classes.funnel(block_index=1)))
    assert inputs["x"].shape[1] == 14
    mappings.compare(mappings.page.funnel, theirs, m, inputs, valid)


def test_bfloat16_is_as_exact_as_the_class(mappings, row):
    m, inputs, theirs, valid = case_of(row)
    ours = getattr(mappings.page, row.function)
    needs_autocast = row.package in ("speechbrain", "ray")  # probabilities are float32, v is not
    if not needs_autocast:
        m, inputs = m.bfloat16(), mappings.converted(inputs, torch.bfloat16)
    with torch.no_grad():
        exact = ours(copy.deepcopy(m).double(), **mappings.converted(inputs, torch.float64))[valid]
        with torch.autocast("cpu", torch.bfloat16, enabled=needs_autocast):
            errors = [float((f(m, **inputs)[valid] - exact).norm()) for f in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("row", classes.ROWS[:2], ids=lambda row: row.case.__name__)
def test_a_row_without_keys_is_0_in_the_class_too(mappings, row):
    m, inputs, theirs, _ = case_of(row)
    name, nothing = {
        "fastspeech2_conformer": ("attention_mask", torch.zeros_like),
        "speechbrain": ("key_padding_mask", torch.ones_like),
    }[row.function]
    inputs = {**inputs, name: nothing(inputs[name])}
    out = theirs(m, **inputs)
    torch.testing.assert_close(out, getattr(mappings.page, row.function)(m, **inputs))
    assert torch.equal(out[0, 0], out[1, 1])  # the bias of the last layer


def test_the_version_on_the_page(mappings, row):
    case_of(row)
    version = importlib.metadata.version(row.package)
    assert f"| {row.package} {version}, `{row.name}` |" in mappings.text
