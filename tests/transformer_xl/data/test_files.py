"""Paths, JSON and locks."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from transformer_xl.data.files import expanded, locked, to_json


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/runs/a") == tmp_path / "runs" / "a"
    assert expanded(Path("~")) == tmp_path
    assert expanded("a/~/b") == Path("a/~/b")
    with pytest.raises(ValueError, match="~nobody-has-this-name/x: "):
        expanded("~nobody-has-this-name/x")


def test_numbers_that_json_does_not_have_become_null() -> None:
    values = {"a": math.inf, "b": [-math.inf, math.nan, 1.5], "c": {"d": (math.nan, 2)}, "e": "NaN"}
    text = to_json(values, indent=1)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, None, 1.5],
        "c": {"d": [None, 2]},
        "e": "NaN",
    }


def test_a_lock_excludes_other_threads_and_leaves_no_file(tmp_path: Path) -> None:
    path, results = tmp_path / "folder" / "lock", []

    def attempt() -> None:
        try:
            with locked(path, timeout=0):
                results.append("acquired")
        except TimeoutError:
            results.append("refused")

    def in_a_thread() -> None:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()

    with locked(path) as acquired:
        in_a_thread()
        with locked(path, timeout=0) as again:
            assert (acquired, again) == (True, False)
        assert path.exists()
    in_a_thread()
    assert results == ["refused", "acquired"]
    assert not path.exists()
