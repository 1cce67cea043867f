"""Conversion of YAML values to the types of settings."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def entry_kind(hint: Any) -> type[Any] | None:
    """Return the dataclass of the entries of a list; None for any other type."""
    entries = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
    is_record = (
        bool(entries)
        and isinstance(entries[0], type)
        and hasattr(entries[0], "__dataclass_fields__")
    )
    return entries[0] if is_record else None


def coerce(value: Any, hint: Any) -> Any:
    """Convert a YAML value to the type of a field.

    YAML 1.1 reads 2e-4 as a string, so a string may become a number.

    Raises:
        TypeError: when the value has another type.
        ValueError: when a text is not a number, or a number is not whole.
        OverflowError: when a number is infinite.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    holders = {typing.get_origin(option): typing.get_args(option) for option in options}
    if value is None or value in ({}, []):
        return _empty(options, holders)
    if isinstance(value, bool) or options == (bool,):
        if bool in options and isinstance(value, bool):
            return value
        raise TypeError
    if dict in holders and isinstance(value, dict):
        return {str(name): coerce(item, holders[dict][1]) for name, item in value.items()}
    if tuple in holders and isinstance(value, (list, tuple)):
        return _items(value, holders[tuple][0])
    if holders.get(tuple, (None,))[0] is int:
        return _items([value], int)
    if int in options:
        number = float(value)
        if number != int(number):
            raise ValueError
        return int(number)
    if float in options:
        return float(value)
    if isinstance(value, str) and str in options:
        return value
    raise TypeError


def _empty(options: Sequence[Any], holders: Mapping[Any, Any]) -> Any:
    """Convert null or an empty list or mapping; other tools write null for both."""
    if types.NoneType in options:
        return None
    if tuple in holders or dict in holders:
        return () if tuple in holders else {}
    raise TypeError


def _items(values: Sequence[Any], kind: type[Any]) -> tuple[Any, ...]:
    """Convert a list of names or of whole numbers."""
    if any(isinstance(v, bool) or not isinstance(v, kind) for v in values):
        raise TypeError
    return tuple(values)


def type_name(hint: Any) -> str:
    """Return the name of a type for a message."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    text = str(hint)
    if hint in names:
        return names[hint]
    if "dict" in text:
        kinds = {str: "names", int: "whole numbers", float: "numbers"}
        return f"a mapping from names to {kinds[typing.get_args(hint)[1]]}"
    if "tuple[int" in text:
        return "an integer or a list of integers"
    return "a string or a list of strings" if "tuple" in text else text
