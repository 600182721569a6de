"""Values and errors in messages: cut where they are long."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


def shortened(value: object) -> str:
    """The `repr` of a value, for a message; the middle of a long one is left out."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of too many digits to be written
        return f"a very long {type(value).__name__}"


def brief(error: BaseException) -> str:
    """The message of an error, cut if it is long; the name of its class if it has none."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise ValueError for a value of an argument unless the condition holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value}")
