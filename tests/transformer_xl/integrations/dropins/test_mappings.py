"""The functions of docs/mappings.md against the classes of the packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest


PATH = Path(__file__).with_name("mapping_classes.py")
spec = importlib.util.spec_from_file_location("mapping_classes", PATH)
assert spec is not None
assert spec.loader is not None
classes = importlib.util.module_from_spec(spec)
sys.modules["mapping_classes"] = classes
spec.loader.exec_module(classes)


def case_of(row):
    try:
        importlib.metadata.version(row.package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{row.package} is not installed")
    return classes.case_of(row)


@pytest.fixture(params=classes.ROWS, ids=lambda row: f"{row.package}-{row.function}")
def row(request):
    return request.param


def test_forward_and_gradients(mappings, row):
    m, inputs, theirs, valid = case_of(row)
    mappings.compare(getattr(mappings.page, row.function), theirs, m, inputs, valid)


def test_the_second_block_of_funnel(mappings):
    row = next(row for row in classes.ROWS if row.function == "funnel")
    m, inputs, theirs, valid = case_of(row._replace(case=lambda: classes.funnel(block_index=1)))
    assert inputs["x"].shape[1] == 14
    mappings.compare(mappings.page.funnel, theirs, m, inputs, valid)


def test_the_version_on_the_page(mappings, row):
    case_of(row)
    version = importlib.metadata.version(row.package)
    assert f"| {row.package} {version}, `{row.name}` |" in mappings.text
