"""Tokens to text while they are drawn: whole characters, and an end before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformer_xl.data import Vocabulary

WINDOW = 64  # tokens that are decoded again with each new one, whose text depends on them


class TokenDecoder:
    """The text that each token adds to that of the tokens before it.

    A character of several tokens is returned with the last of them. An incomplete character at the
    end becomes U+FFFD.

    Args:
        before: tokens that precede the text.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._ids = list(before[-WINDOW:])
        self._text = self._shown = vocabulary.decode(self._ids)

    def feed(self, token: int) -> str:
        """The text of one more token that later tokens cannot change."""
        self._ids.append(token)
        self._text = self._vocabulary.decode(self._ids)
        if self._text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._ids) < 2 * WINDOW:
            return ""
        added = self.end()
        self._ids = self._ids[-WINDOW:]
        self._text = self._shown = self._vocabulary.decode(self._ids)
        return added

    def end(self) -> str:
        """The rest of the text, if no token follows."""
        added = self._text[len(self._shown) :]
        self._shown = self._text
        return added


class StopStrings:
    """A text in pieces that ends before the first of some strings.

    That string is the one that is complete first; of several that are complete at the same
    character, the longest. So the end does not depend on how the text is cut into pieces.

    Args:
        stops: not empty strings.

    Attributes:
        reached: the string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("stop: expected a text, got an empty one")
        self._stops, self._held = tuple(stops), ""
        self.reached: str | None = None

    def feed(self, text: str) -> str:
        """The text that no stop string can contain; the beginning of one is held back."""
        if self.reached is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, self.reached = min(found, key=lambda each: (each[0], -len(each[1])))
            self._held = ""
            return text[: end - len(self.reached)]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def end(self) -> str:
        """The text that was held back, if no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters of the end of `text` are the beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
