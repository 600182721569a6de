"""Scored documents as lines, as JSON, as coloured text in the terminal, and as HTML.

The colour of a token is its surprise, -log2 of its probability: none at 0 bits, the full colour at
MOST_BITS and above.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from transformer_xl.data.files import check_regular, expanded, linked
from transformer_xl.scoring import ScoredDocument, ScoredToken, Totals

MOST_BITS = 16.0
FULL = (232, 93, 4)  # orange
# Unicode's category Cc except tabs and ends of lines, and the characters of Bidi_Control.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Surprise of each token</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto;
         padding: 0 1rem; }}
  h2 {{ font-size: 1rem; margin: 2rem 0 .3rem; }}
  p {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }}
  .note {{ font-size: .85rem; opacity: .75; }}
  i {{ font-style: normal; border-radius: .15rem;
      background: rgb({red} {green} {blue} / var(--a)); }}
  .scale {{ display: inline-block; width: 12rem; height: .8rem; border-radius: .2rem;
           background: linear-gradient(90deg, transparent, rgb({red} {green} {blue})); }}
</style>
<h1>Surprise of each token</h1>
<p class="note">{protocol}</p>
<p class="note">0 bits <span class="scale"></span> {most} bits and more.
Point at a token for its figures.</p>
"""


class View(Protocol):
    """Prints or writes documents as they are scored."""

    def add(self, document: ScoredDocument) -> None:
        """Show one more document."""

    def end(self, totals: Totals) -> None:
        """Show the totals, once, after all documents."""


class Lines:
    """One token and its log-probability in nats on each line, the token as a JSON string."""

    def __init__(self, file: TextIO, protocol: str) -> None:
        self.file, self.protocol = file, protocol

    def add(self, document: ScoredDocument) -> None:
        print(f"# {document.name}", file=self.file)
        for token in document.tokens:
            logprob = "null" if token.logprob is None else f"{token.logprob:.4f}"
            text = json.dumps(token.text, ensure_ascii=False)
            print(f"{text}\t{logprob}", file=self.file)

    def end(self, totals: Totals) -> None:
        for name, value in described(totals):
            print(f"# {name}: {value}", file=self.file)
        print(f"# protocol: {self.protocol}", file=self.file)


class Json:
    """One JSON object: protocol, documents, total. Each document is written when it is scored."""

    def __init__(self, file: TextIO, protocol: str) -> None:
        self.file = file
        self.before = f'{{"protocol": {_json(protocol)}, "documents": [\n'

    def add(self, document: ScoredDocument) -> None:
        self.file.write(self.before + _json(document.as_dict()))
        self.before = ",\n"

    def end(self, totals: Totals) -> None:
        self.file.write(f'\n], "total": {_json(totals.as_dict())}}}\n')


class Colored:
    """The text in the terminal; the background of a token is its surprise."""

    def __init__(self, protocol: str) -> None:
        self.console = Console(highlight=False, emoji=False, soft_wrap=True)
        self.protocol = protocol

    def add(self, document: ScoredDocument) -> None:
        shown = Text()
        found = list(pieces(document))
        after = [*(text for text, _ in found[1:]), ""]
        for (text, token), following in zip(found, after, strict=True):
            shown.append(_printable(text, following), None if token is None else _style(token))
        self.console.print(Text(_printable(document.name), "bold"))
        self.console.print(shown)

    def end(self, totals: Totals) -> None:
        scale = Text("0 bits ")
        for bits in range(int(MOST_BITS) + 1):
            scale.append(" ", _background(bits / MOST_BITS))
        self.console.print(scale.append(f" {MOST_BITS:g} bits and more"))
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in (*described(totals), ("protocol", self.protocol)):
            table.add_row(name, Text(value))
        self.console.print(table)


class Html:
    """A page that needs nothing else: it loads no file and runs no script."""

    def __init__(self, file: TextIO, protocol: str) -> None:
        self.file = file
        names = dict(zip(("red", "green", "blue"), FULL, strict=True))
        file.write(PAGE.format(**names, protocol=escape(protocol), most=f"{MOST_BITS:g}"))

    def add(self, document: ScoredDocument) -> None:
        spans = "".join(
            escape(text) if token is None else _element(text, token)
            for text, token in pieces(document)
        )
        self.file.write(f"<h2>{escape(document.name)}</h2>\n<p>{spans}</p>\n")

    def end(self, totals: Totals) -> None:
        figures = ", ".join(f"{name} {value}" for name, value in described(totals))
        self.file.write(f'<p class="note">{escape(figures)}</p>\n</html>\n')


def described(totals: Totals) -> list[tuple[str, str]]:
    """The names and values of the totals, for people."""
    bound = ">= " if totals.is_bound else ""
    dropped = f", {totals.n_dropped:,} without a token" if totals.n_dropped else ""
    unknown = f", {totals.n_unknown:,} unknown" if totals.n_unknown else ""
    return [
        ("documents", f"{totals.n_documents:,}"),
        ("bytes", f"{totals.n_bytes:,}{dropped}"),
        ("tokens scored", f"{totals.n_tokens:,}{unknown}"),
        ("nats", f"{totals.nats:.4f}"),
        ("bits per byte", f"{bound}{totals.bits_per_byte:.4f}"),
        ("perplexity", "undefined" if totals.ppl is None else f"{totals.ppl:.4f}"),
    ]


def pieces(document: ScoredDocument) -> Iterator[tuple[str, ScoredToken | None]]:
    """The whole text of a document in order: the text of each token, and of the gaps with None.

    Tokens that share a character become one: the first, with the sum of the log-probabilities.
    """
    data, end = document.data, 0
    groups: list[list[ScoredToken]] = []
    for token in document.tokens:
        if groups and (token.start < end or _is_inside(data, end)):
            groups[-1].append(token)
        else:
            groups.append([token])
        end = max(end, token.stop)
    end = 0
    for group in groups:
        start, stop = max(end, group[0].start), max(end, group[-1].stop)
        if end < start:
            yield data[end:start].decode("utf-8", "replace"), None
        known = [token.logprob for token in group if token.logprob is not None]
        total = math.fsum(known) if known else None
        text = data[start:stop].decode("utf-8", "replace")
        yield text, dataclasses.replace(group[0], text=text, stop=stop, logprob=total)
        end = stop
    if end < len(data):
        yield data[end:].decode("utf-8", "replace"), None


def _is_inside(data: bytes, at: int) -> bool:
    """Whether the byte at this offset continues a character of UTF-8."""
    return at < len(data) and data[at] & 0xC0 == 0x80


def _bits(token: ScoredToken) -> float:
    return 0.0 if token.logprob is None else -token.logprob / math.log(2)


def _share(token: ScoredToken) -> float:
    """How much of the full colour a token has, from 0 to 1."""
    return min(max(_bits(token) / MOST_BITS, 0.0), 1.0)


def _style(token: ScoredToken) -> Style | None:
    share = _share(token)
    return _background(share) if share > 0.03 else None


def _background(share: float) -> Style:
    mixed = tuple(round(255 + (full - 255) * share) for full in FULL)
    return Style.parse(f"black on rgb({mixed[0]},{mixed[1]},{mixed[2]})")


def _printable(text: str, following: str = "") -> str:
    """Text without the control characters that a terminal would obey: U+FFFD for each, and the end
    of a line without its "\\r". The "\\n" may begin the `following` text."""
    if following.startswith("\n"):
        text = text.removesuffix("\r")
    return CONTROLS.sub("\ufffd", text.replace("\r\n", "\n"))


def _element(text: str, token: ScoredToken) -> str:
    if token.logprob is None:
        return escape(text)
    title = f"{_bits(token):.2f} bits, probability {math.exp(token.logprob):.3g}, token {token.id}"
    return f'<i style="--a:{_share(token):.2f}" title="{title}">{escape(text)}</i>'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A new text file that becomes `path` at the end; after an error `path` is as before.

    A leading `~` is expanded, and a symbolic link is kept: the file that it names is replaced.

    Raises:
        ValueError: `path` is a folder or a device; nothing is written.
    """
    path = linked(expanded(path))
    if path.exists():
        check_regular(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        with new.open("w", encoding="utf-8") as file:
            yield file
        new.replace(path)
