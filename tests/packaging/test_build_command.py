"""The command in the warning of a first call and in `doctor` builds the kernels for this Python."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest

from txl_kernels.backends import native_installation as installation

OPTIONS = ["--force-reinstall", "--no-deps", "--no-cache-dir"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder that txl_kernels is imported from."""
    folder = tmp_path / "site packages"
    (folder / "txl_kernels").mkdir(parents=True)
    monkeypatch.setattr(installation, "PACKAGE_DIR", folder / "txl_kernels")
    return folder


@pytest.fixture
def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )


def install_from(origin: dict | str | None, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = site / "transformer_xl-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: transformer-xl\nVersion: 0\n", encoding="utf-8")
    if origin is not None:
        (info / "direct_url.json").write_text(
            origin if isinstance(origin, str) else json.dumps(origin), encoding="utf-8"
        )
    monkeypatch.syspath_prepend(site)


def test_pip_builds_again_without_its_cache(site):
    pytest.importorskip("pip")
    words = shlex.split(installation.build_command(), comments=True)
    assert words == [sys.executable, "-m", "pip", "install", *OPTIONS, "."]


def test_an_environment_without_pip_uses_uv_and_names_its_interpreter(
    site, without_pip, monkeypatch
):
    """setuptools splits the setting once more, as a shell does."""
    monkeypatch.setattr(sys, "executable", "/my env/bin/python")
    words = shlex.split(installation.build_command(), comments=True)
    assert words[:5] == ["uv", "pip", "install", "--python", "/my env/bin/python"]
    name, setting = words[5].split("=", 1)
    assert name == "--config-settings"
    key, option = setting.split("=", 1)
    assert key == "--global-option"
    assert shlex.split(option) == ["--torch-python=/my env/bin/python"]
    assert words[6:] == [*OPTIONS, "."]


def test_a_checkout_is_built_in_place(tmp_path, monkeypatch):
    """An installation into site-packages would not be imported."""
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(installation, "PACKAGE_DIR", tmp_path / "txl_kernels")
    words = shlex.split(installation.build_command(), comments=True)
    assert words[-2:] == ["-e", str(tmp_path)]


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ({"url": "file://{site}/my%20file.tar.gz"}, "{site}/my file.tar.gz"),
        ({"url": "file://{site}/gone.tar.gz"}, "transformer-xl==0"),
        ({"url": "file://{site}/a.whl"}, "transformer-xl==0"),
        ({"url": "https://a.org/b.tar.gz", "archive_info": {}}, "https://a.org/b.tar.gz"),
        (
            {"url": "https://a.org/b.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}},
            f"git+https://a.org/b.git@{COMMIT}",
        ),
        (None, "transformer-xl==0"),
        ("{", "transformer-xl==0"),
        ({}, "transformer-xl==0"),
    ],
    ids=["file", "missing_file", "wheel", "archive", "git", "index", "damaged", "empty"],
)
def test_the_source_is_the_one_that_was_installed(site, monkeypatch, origin, source):
    for name in ("my file.tar.gz", "a.whl"):
        (site / name).touch()
    quoted = str(site).replace(" ", "%20")
    if isinstance(origin, dict) and "url" in origin:
        origin = {**origin, "url": origin["url"].format(site=quoted)}
    install_from(origin, site, monkeypatch)
    words = shlex.split(installation.build_command(), comments=True)
    assert words[-1] == source.format(site=site)
    from_index = source.startswith("transformer-xl==")
    assert (words[-3:-1] == ["--no-binary", "transformer-xl"]) == from_index


def test_another_installation_s_source_is_not_used(site, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    install_from({"url": "https://a.org/b.tar.gz"}, other, monkeypatch)
    monkeypatch.setattr(
        importlib.metadata,
        "distributions",
        lambda name: importlib.metadata.Distribution.discover(name=name, path=[str(other)]),
    )
    assert shlex.split(installation.build_command(), comments=True)[-1] == "."


def test_a_reason_ends_with_the_command_and_is_shown_without_it(site, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: [])
    reason = installation.refusal("2.13.0")
    assert reason.endswith(f": {installation.build_command()}")
    assert installation.without_command(reason).endswith("it was never built")
    assert installation.without_command("no products here") == "no products here"
