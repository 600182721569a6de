"""`transformer-xl score`: its forms of output, its documents, and bad input."""

from __future__ import annotations

import html.parser
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from transformer_xl.cli import score_views
from transformer_xl.cli.app import app
from transformer_xl.config import RunConfig
from transformer_xl.data import open_corpus
from transformer_xl.scoring import ScoredDocument, ScoredToken
from transformer_xl.training import Trainer, join_processes

TEXT = "the memory\n<i>of</i> naïve & ☃\n"


@pytest.fixture
def checkpoint(tiny_config: RunConfig, tmp_path: Path) -> Path:
    Trainer(tiny_config, open_corpus(tiny_config.data), join_processes()).save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def run(*arguments: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, ["score", *map(str, arguments)], input=stdin)


def succeed(*arguments: object, stdin: bytes = b"") -> str:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def fail(*arguments: object, stdin: bytes = b"") -> str:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


def test_json_has_every_token_and_its_place(checkpoint: Path, text: Path) -> None:
    found = json.loads(succeed(checkpoint, text, "--json"))
    (document,) = found["documents"]
    data = TEXT.encode()
    assert (document["name"], document["n_bytes"]) == (str(text), len(data))
    assert [token["start"] for token in document["tokens"]] == list(range(len(data)))
    assert [token["id"] for token in document["tokens"]] == list(data)
    logprobs = [token["logprob"] for token in document["tokens"]]
    assert logprobs[0] is None
    assert document["nats"] == pytest.approx(-math.fsum(logprobs[1:]))
    assert document["n_tokens"] == len(data) - 1
    assert found["total"]["nats"] == document["nats"]
    assert "mem_len 24" in found["protocol"]


def test_lines_are_documents_with_their_ends(checkpoint: Path, text: Path) -> None:
    found = json.loads(succeed(checkpoint, text, "--lines", "--json", "--batch-size", 1))
    assert [document["name"] for document in found["documents"]] == [f"{text}:1", f"{text}:2"]
    assert sum(document["n_bytes"] for document in found["documents"]) == len(TEXT.encode())
    together = json.loads(succeed(checkpoint, text, "--lines", "--json"))
    assert together["total"]["nats"] == pytest.approx(found["total"]["nats"], rel=1e-5)


def test_stdin_is_one_document(checkpoint: Path, text: Path) -> None:
    named = json.loads(succeed(checkpoint, text, "--json"))
    read = json.loads(succeed(checkpoint, "--json", stdin=TEXT.encode()))
    assert read["documents"][0]["name"] == "stdin"
    assert read["documents"][0]["tokens"] == named["documents"][0]["tokens"]


def test_text_has_a_token_on_each_line_and_totals_last(checkpoint: Path, text: Path) -> None:
    *_, last = lines = succeed(checkpoint, text).splitlines()
    tokens = [line.split("\t") for line in lines if not line.startswith("#")]
    assert next(value for _, value in tokens) == "null"
    assert json.loads(tokens[10][0]) == "\n"
    assert float(tokens[1][1]) < 0
    assert last.startswith("# protocol: ")
    assert any(line.startswith("# bits per byte: ") for line in lines)


def test_the_page_shows_the_text_and_loads_nothing(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    succeed(checkpoint, text, "--html", page)
    content = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|url\(|<script|@import", content)
    shown = _Paragraphs()
    shown.feed(content)
    assert TEXT in shown.paragraphs
    assert not list(tmp_path.glob(".*"))


def test_after_an_error_the_page_is_as_before(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("before", encoding="utf-8")
    assert "no.txt" in fail(checkpoint, text, tmp_path / "no.txt", "--html", page)
    assert page.read_text(encoding="utf-8") == "before"
    assert not list(tmp_path.glob(".*"))


def test_the_page_may_be_a_link_or_in_the_home_directory(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    succeed(checkpoint, text, "--html", "~/page.html")
    link, page = tmp_path / "link.html", tmp_path / "page.html"
    assert "<title>" in page.read_text(encoding="utf-8")
    page.write_text("before", encoding="utf-8")
    link.symlink_to(page)
    succeed(checkpoint, text, "--html", link)
    assert link.is_symlink()
    assert "<title>" in page.read_text(encoding="utf-8")


def test_a_page_replaces_no_folder_and_no_other_file(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    result = run(checkpoint, text, "--html", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "expected a file, found a folder" in " ".join(result.stderr.split())
    other = tmp_path / ".page.html.new"
    other.write_text("another", encoding="utf-8")
    succeed(checkpoint, text, "--html", tmp_path / "page.html")
    assert other.read_text(encoding="utf-8") == "another"


@pytest.mark.parametrize("form", [(), ("--json",), ("--color",)])
def test_names_that_are_not_utf_8_are_shown(
    checkpoint: Path, text: Path, tmp_path: Path, form: tuple[str, ...]
) -> None:
    strange = tmp_path / "na\udcffme.txt"
    strange.write_text(TEXT, encoding="utf-8")
    page = tmp_path / "page.html"
    assert "na\ufffdme.txt" in succeed(checkpoint, strange, "--html", page, *form)
    assert "na\ufffdme.txt" in page.read_text(encoding="utf-8")


def test_the_terminal_shows_the_text(checkpoint: Path, text: Path) -> None:
    assert TEXT in succeed(checkpoint, text, "--color")


def test_more_surprise_has_more_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    view = score_views.Colored("protocol")
    view.console = Console(color_system="truecolor", force_terminal=True, record=True, width=80)
    tokens = (ScoredToken("a", 0, 0, 1, -0.001), ScoredToken("b", 1, 1, 2, -30.0))
    with view.console.capture() as capture:
        view.add(ScoredDocument("name", b"ab\x1b", tokens, 0))
    shown = capture.get()
    assert "48;2;232;93;4mb" in shown
    assert "ma" not in shown.splitlines()[1]
    assert "\N{REPLACEMENT CHARACTER}" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u00a0b\u3000c\u00ad\u200d\n", "a\u00a0b\u3000c\u00ad\u200d\n"),
        ("a\tb", "a       b"),
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680"),
        ("a\r\nb\rc", "a\nb\ufffdc"),
        ("\0\x1b[2J\x7f\x9b", "\ufffd\ufffd[2J\ufffd\ufffd"),
        ("\u202eab\u2066\u200f", "\ufffdab\ufffd\ufffd"),
    ],
)
@pytest.mark.parametrize("is_one_token", [True, False])
def test_only_controls_are_replaced_in_the_terminal(
    text: str, shown: str, is_one_token: bool
) -> None:
    view = score_views.Colored("protocol")
    view.console = Console(soft_wrap=True, width=80)
    data = text.encode()
    ends = [0, len(data)] if is_one_token else range(len(data) + 1)
    tokens = tuple(ScoredToken("", 0, start, stop, None) for start, stop in pairwise(ends))
    with view.console.capture() as capture:
        view.add(ScoredDocument("\x1bname", data, tokens, 0))
    assert capture.get() == f"\ufffdname\n{shown}\n"


def test_parts_of_a_character_are_shown_together() -> None:
    data = "a☃b".encode()
    tokens = tuple(ScoredToken("", i, i, i + 1, -1.0) for i in range(len(data)))
    found = list(score_views.pieces(ScoredDocument("name", data, tokens, 0)))
    assert [text for text, _ in found] == ["a", "☃", "b"]
    assert found[1][1] is not None
    assert found[1][1].logprob == -3.0


def test_gaps_between_tokens_are_shown() -> None:
    tokens = (ScoredToken("a", 0, 1, 2, None), ScoredToken("b", 1, 4, 5, -1.0))
    found = list(score_views.pieces(ScoredDocument("name", b" a  b\n", tokens, 0)))
    assert "".join(text for text, _ in found) == " a  b\n"


def test_an_empty_text_is_refused(checkpoint: Path) -> None:
    assert "stdin: expected at least one token, found none" in fail(checkpoint)
    assert "expected a text, got none" in fail(checkpoint, "--lines")


def test_options_that_contradict_are_refused(checkpoint: Path, text: Path) -> None:
    assert "--json and --color" in fail(checkpoint, text, "--json", "--color")
    assert "--batch-size: expected 1 or more, got 0" in fail(checkpoint, text, "--batch-size", 0)
    assert "tgt_len" in fail(checkpoint, text, "--tgt-len", 0)


class _Paragraphs(html.parser.HTMLParser):
    """The text of each paragraph of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag == "p":
            self.paragraphs.append("")

    def handle_data(self, data: str) -> None:
        if self.paragraphs:
            self.paragraphs[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self.paragraphs.append("")
