"""The codec: every message survives the trip, and hostile bytes give WireError, never anything else."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from enum import IntEnum, StrEnum
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import job_messages, messages, rtc_messages, wire

MESSAGES = [
    kind
    for module in (messages, rtc_messages, job_messages)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=8),
    int: st.integers(-(2**63), 2**64 - 1),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bytes: st.binary(max_size=20),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a message field's type."""
    if hint in SCALARS:
        return SCALARS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.none() | values(next(a for a in arguments if a is not type(None)))
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if issubclass(hint, StrEnum | IntEnum):
        return st.sampled_from(list(hint))
    return instances(hint)


def instances(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Messages of one kind with arbitrary fields."""
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{f.name: values(hints[f.name]) for f in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=40)  # of each
@given(data=st.data())
def test_every_message_survives_the_round_trip(kind: type[Any], data: st.DataObject) -> None:
    """What was encoded is decoded to an equal message, over the bus and in a table."""
    message = data.draw(instances(kind))

    assert wire.decode(wire.encode(message), kind) == message
    assert wire.from_json(wire.to_json(message), kind) == message


@given(data=st.binary(max_size=200))
def test_hostile_bytes_give_wire_error(data: bytes) -> None:
    """Arbitrary bytes are refused with WireError and nothing else."""
    with pytest.raises(wire.WireError):
        wire.decode(data, *MESSAGES)
    with pytest.raises(wire.WireError):
        wire.from_json(data, messages.Request)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(kind=st.sampled_from(MESSAGES), data=st.data())
def test_a_field_of_a_wrong_type_is_named(kind: type[Any], data: st.DataObject) -> None:
    """A message with one field replaced by anything decodes to that kind, or fails with WireError naming the field."""
    plain = msgpack.unpackb(wire.encode(data.draw(instances(kind))), strict_map_key=False)
    name = data.draw(st.sampled_from([f.name for f in dataclasses.fields(kind)]))
    plain[name] = data.draw(PLAIN)

    try:
        decoded = wire.decode(msgpack.packb(plain), kind)
    except wire.WireError as error:
        assert f"{kind.__name__}.{name}" in str(error)  # noqa: PT017 - either way is right
    else:
        assert isinstance(decoded, kind)


def test_truncated_and_bloated_messages_are_refused() -> None:
    """Every proper prefix of a message, and a message with trailing bytes, is a WireError."""
    data = wire.encode(messages.Cancel(request="r", attempt=1))
    for length in range(len(data)):
        with pytest.raises(wire.WireError):
            wire.decode(data[:length], messages.Cancel)
    with pytest.raises(wire.WireError):
        wire.decode(data + b"\x00", messages.Cancel)


def test_deep_nesting_is_refused() -> None:
    """A message nested a hundred thousand levels deep is a WireError, not a crash."""
    with pytest.raises(wire.WireError):
        wire.unpack(b"\x91" * 100_000 + b"\x01")


def test_unknown_fields_are_ignored_and_missing_ones_take_defaults() -> None:
    """A newer peer's extra field is ignored, an older peer's missing field takes its default."""
    data = msgpack.packb({"t": "Cancel", "request": "r", "attempt": 2, "colour": "green"})

    assert wire.decode(data, messages.Cancel) == messages.Cancel(request="r", attempt=2)


def test_a_missing_required_field_is_named() -> None:
    """A field without default that is absent is named in the error."""
    with pytest.raises(wire.WireError, match=r"Cancel\.attempt is missing"):
        wire.decode(msgpack.packb({"t": "Cancel", "request": "r"}), messages.Cancel)


def test_another_kind_is_refused() -> None:
    """A known message on a subject that does not carry it is refused by name."""
    with pytest.raises(wire.WireError, match="expected Cancel, got 'Beat'"):
        wire.decode(wire.encode(messages.Beat(kind="te", id="x")), messages.Cancel)
