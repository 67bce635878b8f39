"""Checks for one field of a JSON body: each takes a value and the field's name, and returns the value in our type.

A wrong type or a value out of bounds is an InvalidRequest naming the field. null stands for "not given" everywhere,
which `read` handles, so no check sees None. This module must not know any particular field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import InvalidRequest

Check = Callable[[Any, str], Any]


@dataclass(frozen=True, slots=True)
class Field:
    """A known field: how to check it, and what stands for its absence."""

    check: Check
    default: Any = None


def read(body: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Every known field of `body`, checked or by default. Unknown ones are left out."""
    values = {}
    for name, field in fields.items():
        value = body.get(name)
        values[name] = field.default if value is None else field.check(value, name)
    return values


def refuse_unserved(body: Mapping[str, Any], unserved: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises InvalidRequest for a field that would change the answer and is not served; `unserved` holds, per name,
    the values that ask for nothing."""
    for name, harmless in unserved.items():
        value = body.get(name)
        if value is None or any(type(value) is type(one) and value == one for one in harmless):
            continue
        raise InvalidRequest(f"'{name}' is not supported by this server", param=name)


def wrong_type(name: str, expected: str, value: object) -> InvalidRequest:
    """The error for a value of the wrong type."""
    return InvalidRequest(
        f"Invalid type for '{name}': expected {expected}, but got {_kind(value)} instead.",
        param=name,
    )


def out_of_range(name: str, rule: str) -> InvalidRequest:
    """The error for a value of the right type that breaks a bound."""
    return InvalidRequest(f"Invalid value for '{name}': {rule}.", param=name)


def integer(low: int, high: int) -> Check:
    """A whole number in [low, high]."""

    def check(value: Any, name: str) -> int:
        if type(value) is not int:
            raise wrong_type(name, "an integer", value)
        if not low <= value <= high:
            raise out_of_range(name, f"must be between {low} and {high}")
        return value

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A finite number in [low, high], or (low, high] if `above`."""

    def check(value: Any, name: str) -> float:
        if type(value) not in (int, float):
            raise wrong_type(name, "a number", value)
        # A huge integer need not fit a float: compare before converting.
        inside = (low < value if above else low <= value) and value <= high
        if not inside or not math.isfinite(value):
            bound = f"above {low:g} and at most" if above else f"between {low:g} and"
            raise out_of_range(name, f"must be {bound} {high:g}")
        return float(value)

    return check


def flag(value: Any, name: str) -> bool:
    """true or false."""
    if type(value) is not bool:
        raise wrong_type(name, "a boolean", value)
    return value


def text(max_characters: int, *, empty: bool = True) -> Check:
    """A string of bounded length."""

    def check(value: Any, name: str) -> str:
        if type(value) is not str:
            raise wrong_type(name, "a string", value)
        if len(value) > max_characters:
            raise out_of_range(name, f"must be at most {max_characters} characters long")
        if not value and not empty:
            raise out_of_range(name, "must not be empty")
        return value

    return check


def items(check_item: Check, low: int, high: int) -> Check:
    """An array of `low` to `high` items, each checked under the name `field[i]`."""

    def check(value: Any, name: str) -> list[Any]:
        if type(value) is not list:
            raise wrong_type(name, "an array", value)
        if not low <= len(value) <= high:
            raise out_of_range(name, f"must have {low} to {high} items, not {len(value)}")
        return [check_item(item, f"{name}[{i}]") for i, item in enumerate(value)]

    return check


def mapping(value: Any, name: str) -> dict[str, Any]:
    """An object."""
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise wrong_type(name, "an object", value)
    return value


def one_of(*values: str) -> Check:
    """One of some strings."""

    def check(value: Any, name: str) -> str:
        if type(value) is not str:
            raise wrong_type(name, "a string", value)
        if value not in values:
            raise out_of_range(name, "must be " + " or ".join(map(repr, values)))
        return value

    return check


def _kind(value: object) -> str:
    match value:
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case dict():
            return "an object"
        case None:
            return "null"
        case _:
            return "something that is not JSON"
