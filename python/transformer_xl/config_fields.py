"""Dataclasses of a configuration from plain values and from text, and back."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from transformer_xl.messages import shortened

T = TypeVar("T")

INT64 = range(-(1 << 63), 1 << 63)


def differences(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    """Both values of each field in which two configurations, or two sections, differ, by dotted
    name."""
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(first):
        name = field.name
        before, after = getattr(first, name), getattr(second, name)
        if dataclasses.is_dataclass(before):
            found |= {f"{name}.{k}": pair for k, pair in differences(before, after).items()}
        elif before != after:
            found[name] = (before, after)
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration, or one section of it, as plain dicts, lists and scalars (JSON, YAML)."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def section_from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """One dataclass of this module from a mapping, types checked; ValueError names the field."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or cls.__name__}: expected fields, got {shortened(values)}")
    hints = get_type_hints(cls)
    dotted = f"{where}." if where else ""
    for name in values:
        check_name(f"field of {where or cls.__name__}", name, hints)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"{dotted}{field.name} is missing")
    return cls(**{k: _checked(f"{dotted}{k}", hints[k], value) for k, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def check_name(kind: str, name: object, known: Collection[str]) -> None:
    if isinstance(name, str) and name in known:
        return
    # Comparing two texts takes a time that is proportional to the product of their lengths.
    near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.0)
    raise ValueError(f"unknown {kind} {shortened(name)}; did you mean {near[0]!r}?")


def _checked(name: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint`, read from text where it is text."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return section_from_dict(hint, value, name)
    if origin is Literal:
        check_name(f"value of {name}", value, arguments)
        return value
    if origin in (Union, types.UnionType):
        if value is None or value in ("none", "null"):
            return None
        return _checked(name, arguments[0], value)
    if origin is tuple:
        items = value.strip("()[] ").split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            kind = arguments[0].__name__
            raise ValueError(f"{name}: expected a list of {kind}, got {shortened(value)}")
        return tuple(_checked(name, arguments[0], item) for item in items if item != "")
    return _scalar(name, hint, value)


def _scalar(name: str, hint: type, value: Any) -> Any:
    expected = hint.__name__
    try:
        converted = _converted(hint, value)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise OverflowError
        if type(converted) is int and converted not in INT64:
            expected = "an integer of 64 bits"
            raise OverflowError
        return converted
    except OverflowError:
        expected = "a finite number" if hint is float else expected
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{name}: expected {expected}, got {shortened(value)}")


def _converted(hint: type, value: Any) -> Any:
    """`value` as the type `hint`; KeyError, ValueError or OverflowError if it is no such value."""
    if hint is bool and isinstance(value, str):
        return {"true": True, "false": False}[value.strip().lower()]
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    if hint is not bool and (isinstance(value, str) or (hint is float and type(value) is int)):
        return hint(value)
    raise ValueError(value)
