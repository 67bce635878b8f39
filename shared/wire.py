"""Messages to bytes and back: a strict codec over msgpack (bus) and JSON (tables). The only import of msgpack.

A message travels as a map with its class name under `t`, so a captured frame reads itself. Decoding is where types
are checked, once: a missing field takes its default, an unknown field is ignored (a newer peer may send it), a wrong
type or unknown tag is a `WireError` that names the field. Hostile bytes raise `WireError` and nothing else. Each
class gets its plan compiled on first use; `dataclasses.asdict` would be fifty times slower.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from enum import Enum, IntEnum, StrEnum
from typing import Any, Final, TypeVar

import msgpack  # type: ignore[import-untyped]
import orjson

M = TypeVar("M")
_TAG: Final = "t"

Encoder = Callable[[Any], Any]
Decoder = Callable[[Any, str], Any]


class WireError(ValueError):
    """These bytes are not a message we know; the text names the field."""


def encode(message: Any) -> bytes:
    """A message dataclass as msgpack bytes."""
    packed: bytes = msgpack.packb(_plan(type(message)).to_map(message))
    return packed


def decode(data: bytes, *kinds: type[M]) -> M:
    """The message in `data`, which must be one of `kinds`. Raises WireError."""
    return _from_map(unpack(data), kinds)


def prepare(*kinds: type[Any]) -> None:
    """Compile the plans of these messages now, not at their first use."""
    for kind in kinds:
        _plan(kind)


def pack(value: object) -> bytes:
    """Plain values as msgpack bytes."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack(data: bytes) -> Any:
    """Plain values from msgpack bytes of any origin. Raises WireError."""
    try:
        return msgpack.unpackb(data, strict_map_key=False, raw=False, use_list=True)
    except RecursionError as error:
        raise WireError("nested too deeply") from error
    except Exception as error:  # msgpack raises a dozen unrelated types on hostile bytes
        raise WireError(f"not msgpack: {type(error).__name__}") from error


def to_json(message: Any) -> bytes:
    """A message as JSON, for tables that people read; bytes fields become hex."""
    return orjson.dumps(_plan(type(message)).to_map(message), default=_hex, option=_JSON_OPTIONS)


def from_json(data: bytes, kind: type[M]) -> M:
    """The message of that kind in a table's value. Raises WireError."""
    try:
        plain = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise WireError("not JSON") from error
    return _from_map(plain, (kind,))


_JSON_OPTIONS: Final = orjson.OPT_NON_STR_KEYS


def _hex(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(type(value).__name__)


def _from_map(plain: Any, kinds: tuple[type[M], ...]) -> M:
    if not isinstance(plain, dict):
        raise WireError(f"a message is a map, not {type(plain).__name__}")
    tag = plain.get(_TAG)
    for kind in kinds:
        if kind.__name__ == tag:
            return typing.cast("M", _plan(kind).from_map(plain, kind.__name__))
    known = " or ".join(kind.__name__ for kind in kinds)
    raise WireError(f"expected {known}, got {_short(tag)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    encode: Encoder | None  # None: the value is plain already
    decode: Decoder
    required: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """How one class is written and read."""

    kind: type[Any]
    fields: tuple[_Field, ...]

    def to_map(self, message: Any) -> dict[str, Any]:
        out: dict[str, Any] = {_TAG: self.kind.__name__}
        for field in self.fields:
            value = getattr(message, field.name)
            out[field.name] = value if field.encode is None else field.encode(value)
        return out

    def from_map(self, plain: Any, where: str) -> Any:
        if not isinstance(plain, dict):
            raise WireError(f"{where}: expected a map, got {type(plain).__name__}")
        values: dict[str, Any] = {}
        for field in self.fields:
            if field.name in plain:
                values[field.name] = field.decode(plain[field.name], f"{where}.{field.name}")
            elif field.required:
                raise WireError(f"{where}.{field.name} is missing")
        return self.kind(**values)


_PLANS: Final[dict[type[Any], _Plan]] = {}


def _plan(kind: type[Any]) -> _Plan:
    plan = _PLANS.get(kind)
    if plan is None:
        plan = _PLANS[kind] = _compile(kind)
    return plan


def _compile(kind: type[Any]) -> _Plan:
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind.__name__} is not a message")
    hints = typing.get_type_hints(kind)
    fields = []
    for field in dataclasses.fields(kind):
        encoder, decoder = _codec(hints[field.name])
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        fields.append(_Field(field.name, encoder, decoder, required))
    return _Plan(kind, tuple(fields))


def _codec(hint: Any) -> tuple[Encoder | None, Decoder]:
    """The encoder (None where the value is plain) and the checking decoder for one annotation."""
    if hint in _SCALARS:
        return None, _SCALARS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and type(None) in arguments:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _optional(*_codec(inner))
    if origin is list:
        return _list(arguments[0])
    if origin is dict:
        return _dict(*arguments)
    if isinstance(hint, type) and issubclass(hint, StrEnum | IntEnum):
        plain = str if issubclass(hint, StrEnum) else int
        return plain, _enum(hint, plain)
    if dataclasses.is_dataclass(hint):
        plan = _plan(typing.cast("type[Any]", hint))
        return plan.to_map, plan.from_map
    raise TypeError(f"no codec for {hint}")


def _scalar(kind: type, *also: type) -> Decoder:
    allowed = (kind, *also)

    def read(value: Any, where: str) -> Any:
        # bool is an int in Python, and must not pass for one
        if type(value) not in allowed:
            raise WireError(f"{where}: expected {kind.__name__}, got {type(value).__name__}")
        return value if type(value) is kind else kind(value)

    return read


def _bytes(value: Any, where: str) -> bytes:
    if type(value) is bytes:
        return value
    if type(value) is str:  # from a JSON table
        try:
            return bytes.fromhex(value)
        except ValueError as error:
            raise WireError(f"{where}: not hex") from error
    raise WireError(f"{where}: expected bytes, got {type(value).__name__}")


_SCALARS: Final[dict[Any, Decoder]] = {
    str: _scalar(str),
    int: _scalar(int),
    bool: _scalar(bool),
    float: _scalar(float, int),
    bytes: _bytes,
}


def _optional(encoder: Encoder | None, decoder: Decoder) -> tuple[Encoder | None, Decoder]:
    def write(value: Any) -> Any:
        return None if value is None or encoder is None else encoder(value)

    def read(value: Any, where: str) -> Any:
        return None if value is None else decoder(value, where)

    return (None if encoder is None else write), read


def _list(item: Any) -> tuple[Encoder | None, Decoder]:
    encoder, decoder = _codec(item)
    plain = item if item in (int, str, bytes) else None

    def write(values: list[Any]) -> list[Any]:
        assert encoder is not None
        return [encoder(value) for value in values]

    def read(values: Any, where: str) -> list[Any]:
        if type(values) is not list:
            raise WireError(f"{where}: expected list, got {type(values).__name__}")
        # The common long lists (token ids, hashes) are checked without a call per item.
        if plain is not None and set(map(type, values)) <= {plain}:
            return values
        return [decoder(value, f"{where}[{i}]") for i, value in enumerate(values)]

    return (None if encoder is None else write), read


def _dict(key: Any, value: Any) -> tuple[Encoder | None, Decoder]:
    encode_value, read_value = _codec(value)
    _, read_key = _codec(key)

    def write(items: dict[Any, Any]) -> dict[Any, Any]:
        assert encode_value is not None
        return {name: encode_value(item) for name, item in items.items()}

    def read(items: Any, where: str) -> dict[Any, Any]:
        if type(items) is not dict:
            raise WireError(f"{where}: expected map, got {type(items).__name__}")
        out = {}
        for name, item in items.items():
            if key is int and type(name) is str and name.lstrip("-").isdecimal():
                name = int(name)  # JSON has string keys only
            out[read_key(name, f"{where} key")] = read_value(item, f"{where}[{_short(name)}]")
        return out

    return (None if encode_value is None else write), read


def _enum(kind: type[Enum], plain: type) -> Decoder:
    def read(value: Any, where: str) -> Any:
        try:
            if type(value) is not plain:
                raise ValueError
            return kind(value)
        except ValueError as error:
            raise WireError(f"{where}: {_short(value)} is none of {[*kind]}") from error

    return read
