"""`native.unavailable_reason` under every kind of build record, none of which may be loaded."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from txl_kernels.backends import native

RECORD = {"built": True, "torch": torch.__version__, "python": native._THIS_PYTHON}


@pytest.fixture
def reason_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict | str | None], str]:
    """Asks for the reason in a package folder that holds the given record and no `_C`."""
    monkeypatch.setattr(native, "PACKAGE_DIR", tmp_path)
    monkeypatch.setattr(native, "load", lambda: pytest.fail("loaded before the record was judged"))

    def ask(record: dict | str | None) -> str:
        native.unavailable_reason.cache_clear()
        if record is not None:
            text = record if isinstance(record, str) else json.dumps(record)
            (tmp_path / native.RECORD_NAME).write_text(text, encoding="utf-8")
        reason = native.unavailable_reason()
        assert reason is not None
        return reason

    yield ask
    native.unavailable_reason.cache_clear()


def test_another_minor_version_of_torch_is_refused_before_loading(reason_for):
    reason = reason_for({**RECORD, "torch": "2.1.0"})
    assert "built for torch 2.1.0" in reason
    assert torch.__version__ in reason


def test_another_python_is_refused_before_loading(reason_for):
    assert "built for Python 3.7" in reason_for({**RECORD, "python": "3.7"})


def test_the_reason_that_the_build_recorded_is_given(reason_for):
    assert "no C++ compiler" in reason_for({"built": False, "reason": "no C++ compiler was found"})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"built": true}'])
def test_a_damaged_record_is_a_reason(reason_for, text):
    assert "unreadable" in reason_for(text)


def test_a_folder_without_a_build_is_named(reason_for, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: [])
    reason = reason_for(None)
    assert str(tmp_path) in reason
    assert "never built" in reason


def test_a_checkout_in_front_of_an_installed_build_is_named(
    reason_for, tmp_path, tmp_path_factory, monkeypatch
):
    site = tmp_path_factory.mktemp("site-packages")
    (site / "txl_kernels").mkdir()
    (site / "txl_kernels" / native.RECORD_NAME).write_text("{}", encoding="utf-8")
    info = site / "transformer_xl-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: transformer-xl\nVersion: 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(site)
    reason = reason_for(None)
    assert str(tmp_path) in reason
    assert str(site / "txl_kernels") in reason


@pytest.mark.parametrize("torch_version", ["2.13.0", "2.13.1+cpu", "2.13.0a0+gitabc"])
def test_a_library_that_does_not_load_is_a_reason(reason_for, monkeypatch, torch_version):
    def load() -> ModuleType:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(native, "load", load)
    monkeypatch.setattr(torch, "__version__", torch_version)
    assert "undefined symbol: x" in reason_for({**RECORD, "torch": "2.13.0+cu130"})


def test_a_torch_without_any_product_of_tiles_is_a_reason(reason_for, monkeypatch):
    library = SimpleNamespace(gemm_unavailable_reason=lambda: "no products here")
    monkeypatch.setattr(native, "load", lambda: library)
    assert reason_for(RECORD) == "no products here"
