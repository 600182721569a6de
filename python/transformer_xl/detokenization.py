"""WikiText's words to ordinary text: no space before a comma, hyphens and numbers joined.

WikiText separates punctuation from words, as the Moses tokenizer does, and marks a hyphen, comma or
point inside a word or number: `well @-@ known`, `1 @,@ 000`, `2 @.@ 5`. The form of a word depends
on the words before it alone, so a text can be shown while it is written.
"""

from __future__ import annotations

import re

INSIDE = re.compile(r"@(.)@")  # a sign within a word or number
CLOSES = re.compile(r"[,.;:!?%)\]}’”]|\.\.\.|…|'\w+|n't")  # no space before it
OPENS = re.compile(r"[(\[{$£€#“‘]")  # no space after it
JOINS = re.compile(r"[/°]")  # neither
WORDS = re.compile(r"\n|\S+")  # the end of a line, or a word


def detokenize(text: str) -> str:
    """A whole text without the spaces of WikiText's words."""
    words = Detokenizer()
    return words.feed(text) + words.end()


class Detokenizer:
    """A text in pieces, without the spaces of WikiText's words.

    Double quotes open and close in turn within a line. So do single ones, but one after a word
    that ends with s is an apostrophe if none is open. At the start and the end of a line there is
    no space.
    """

    def __init__(self) -> None:
        self._rest = ""  # may continue with the next piece
        self._before = "\n"  # the word or end of a line before it, as it was written
        self._glued = True  # whether no space follows that word
        self._open: set[str] = set()

    def feed(self, text: str) -> str:
        """The text of all words that are complete."""
        text = self._rest + text
        complete = next((i for i in range(len(text), 0, -1) if text[i - 1].isspace()), 0)
        self._rest = text[complete:]
        return self._joined(text[:complete])

    def end(self) -> str:
        """The text of the last word, if none follows."""
        rest, self._rest = self._rest, ""
        return self._joined(rest)

    def _joined(self, text: str) -> str:
        return "".join(self._word(word) for word in WORDS.findall(text))

    def _word(self, word: str) -> str:
        """The word, after a space if one separates it from the word before it."""
        if word == "\n":
            self._open.clear()
            self._before, self._glued = word, True
            return word
        closes, opens = self._sides(word)
        space = "" if closes or self._glued else " "
        self._before, self._glued = word, opens
        inside = INSIDE.fullmatch(word)
        return space + (inside.group(1) if inside else word)

    def _sides(self, word: str) -> tuple[bool, bool]:
        """Whether a word adjoins the word before it, and the one after it."""
        if word in ('"', "'"):
            return self._quote(word)
        if INSIDE.fullmatch(word) or JOINS.fullmatch(word):
            return True, True
        of_heading = word == self._before == "="
        return bool(CLOSES.fullmatch(word)) or of_heading, bool(OPENS.fullmatch(word))

    def _quote(self, mark: str) -> tuple[bool, bool]:
        if mark in self._open:
            self._open.remove(mark)
            return True, False
        if mark == "'" and self._before.endswith("s"):
            return True, False
        self._open.add(mark)
        return False, True
