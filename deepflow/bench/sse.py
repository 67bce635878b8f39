"""Server-sent events of the OpenAI API, read after the fact. Pure.

While a load runs the client only stamps the bytes that come in; what they say is worked out when the answer is over,
so that the client takes as little as possible of the processor that it shares with what it measures. This module must
not know HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass(slots=True)
class Answer:
    """A streamed answer: arrival of each chunk that carried text, the text, and how it ended."""

    times_s: list[float] = field(default_factory=list)
    id: str = ""
    text: str = ""
    finish: str = ""
    error: str = ""
    is_done: bool = False  # `data: [DONE]` came
    usage: dict[str, Any] = field(default_factory=dict)


def read(pieces: Iterable[tuple[float, bytes]]) -> Answer:
    """The answer in `pieces` of (arrival, bytes), cut anywhere; a line counts as arrived with its last byte.

    Comments and unknown fields are skipped, as the standard wants. What is not JSON ends the reading with an `error`.
    """
    answer = Answer()
    texts: list[str] = []
    rest = b""
    for time_s, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                answer.is_done = True
                continue
            try:
                event = orjson.loads(payload)
            except orjson.JSONDecodeError:
                answer.error = f"not JSON: {payload[:80]!r}"
                return answer
            text = _event(answer, event)
            if text:
                answer.times_s.append(time_s)
                texts.append(text)
    answer.text = "".join(texts)
    return answer


def _event(answer: Answer, event: dict[str, Any]) -> str:
    """Take in one event; its text."""
    if "error" in event:
        error = event["error"]
        answer.error = str(error.get("message", error) if isinstance(error, dict) else error)
        return ""
    answer.id = event.get("id") or answer.id
    answer.usage = event.get("usage") or answer.usage
    text = ""
    for choice in event.get("choices", ()):
        answer.finish = choice.get("finish_reason") or answer.finish
        text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return text
