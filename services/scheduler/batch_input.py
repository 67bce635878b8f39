"""A batch's input: JSONL as it comes from the store, line by line, and what a line must be like.

This module must not know how lines are run, nor what a body may hold beyond its model: the gateway checks that, as it
does for everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import orjson

from shared.job_messages import LineError

MAX_LINE_BYTES: Final = 4 * 1024 * 1024 - 64 * 1024  # it travels in one message of the bus
MAX_LINES: Final = 50_000  # OpenAI's
MAX_ERRORS: Final = 100
MAX_CUSTOM_ID: Final = 512
_BREATH: Final = 128  # lines
_MAX_WITH_BLANK: Final = 2 * MAX_LINES
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class InputLine:
    """One request. `body` is JSON."""

    custom_id: str
    model: str
    body: bytes


class LineFault(Exception):
    """What is wrong with a line."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


@dataclass(slots=True)
class Checked:
    """What a look at the whole input gave. `model` is "" where the lines name several."""

    num_lines: int
    model: str
    errors: list[LineError]


async def split(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, bytes]]:
    """Lines that are not blank, each with its number, counted from 1. Raises LineFault for one that is too long, and
    for far too many."""
    number, rest = 0, b""
    async for chunk in chunks:
        *complete, rest = (rest + chunk).split(b"\n")
        for line in complete:
            if not number:
                line = line.removeprefix(_BOM)
            number += 1
            if number > _MAX_WITH_BLANK:
                raise LineFault("too_many_tasks", f"A file holds at most {number - 1} lines.")
            # A piece may hold thousands of lines, and others share the loop.
            if number % _BREATH == 0:
                await asyncio.sleep(0)
            if stripped := line.strip():
                yield number, stripped
        if len(rest) > MAX_LINE_BYTES:
            raise LineFault("line_too_long", f"Line {number + 1} is too long.")
    if not number:
        rest = rest.removeprefix(_BOM)
    if stripped := rest.strip():
        yield number + 1, stripped


def parse(line: bytes, endpoint: str) -> InputLine:
    """A line's request. Raises LineFault."""
    if len(line) > MAX_LINE_BYTES:
        raise LineFault("line_too_long", f"A line holds at most {MAX_LINE_BYTES} bytes.")
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LineFault("invalid_json_line", "This line is not parseable as valid JSON.") from error
    if type(values) is not dict:
        raise LineFault("invalid_json_line", "This line is not a JSON object.")
    custom_id = _string(values, "custom_id")
    if len(custom_id) > MAX_CUSTOM_ID:
        raise LineFault(
            "invalid_custom_id", f"A custom_id has at most {MAX_CUSTOM_ID} characters.", "custom_id"
        )
    if _string(values, "method").upper() != "POST":
        raise LineFault("invalid_method", "The method of a request must be POST.", "method")
    if _string(values, "url") != endpoint:
        raise LineFault(
            "mismatched_url", f"The url of every request must be the batch's, {endpoint}.", "url"
        )
    body = values.get("body")
    if type(body) is not dict:
        raise _missing("body", "an object")
    model = body.get("model")
    if type(model) is not str or not model:
        raise _missing("body.model", "a string")
    if body.get("stream"):
        raise LineFault("invalid_request", "A batch's answers are not streamed.", "body.stream")
    try:
        return InputLine(custom_id, model, orjson.dumps(body))
    except orjson.JSONEncodeError as error:
        raise LineFault("invalid_json_line", "This line is nested too deeply.", "body") from error


def _string(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if type(value) is not str or not value:
        raise _missing(name, "a string")
    return value


def _missing(name: str, kind: str) -> LineFault:
    return LineFault("missing_required_parameter", f"'{name}' must be given, as {kind}.", name)


async def check(lines: AsyncIterator[tuple[int, bytes]], endpoint: str) -> Checked:
    """Look at every line. At most `MAX_ERRORS` are told."""
    num_lines = 0
    models: set[str] = set()
    seen: set[bytes] = set()
    errors: list[LineError] = []
    try:
        async for number, raw in lines:
            num_lines += 1
            if num_lines > MAX_LINES:
                raise LineFault("too_many_tasks", f"A batch holds at most {MAX_LINES} requests.")
            try:
                line = parse(raw, endpoint)
                digest = blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=16)
                if digest.digest() in seen:
                    raise LineFault(
                        "duplicate_custom_id",
                        "The custom_id of this request is that of another one: each must be unique.",
                        "custom_id",
                    )
                seen.add(digest.digest())
                if len(models) < 2:
                    models.add(line.model)
            except LineFault as fault:
                errors.append(_error(fault, number))
                if len(errors) == MAX_ERRORS:
                    break
        if not num_lines:
            raise LineFault("empty_file", "The input file holds no request.")
    except LineFault as fault:  # of the file as a whole
        errors.append(_error(fault, None))
    return Checked(num_lines, models.pop() if len(models) == 1 else "", errors)


def _error(fault: LineFault, line: int | None) -> LineError:
    return LineError(code=fault.code, message=fault.message, param=fault.param, line=line)
