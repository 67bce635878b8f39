"""The streamed form of an answer, for both APIs: one writer, so that the order of events is right in one place.

A stream is, per choice: (chat) a chunk with the role; chunks with text, finish_reason null; one chunk without text and
with the finish_reason. After all choices: (include_usage) one chunk without choices and with the usage; every other
chunk then carries `usage: null`. The caller adds the framing: for SSE `data: ...` and at last `data: [DONE]`; an error
after the first chunk is an event `data: {"error": ...}` and the end, without [DONE].

Tokens are many and chunks are alike, so all but the text is encoded once per stream. This module must not know where
pieces come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import orjson

from services.gateway.answer import Usage
from services.gateway.choices import Piece, TokenEntry
from services.gateway.openai.bodies import (
    Header,
    chat_logprobs,
    error_body,
    text_logprobs,
    usage_body,
)
from shared.errors import DeepFlowError
from shared.text.tokenizer import Tokenizer

DONE: Final = b"data: [DONE]\n\n"
_NULL: Final = b"null"


class ChunkWriter:
    """Writes the chunks of one answer. `tokenizer` is given where logprobs are wanted."""

    def __init__(
        self, header: Header, num_choices: int, *, with_usage: bool, tokenizer: Tokenizer | None
    ) -> None:
        self._chat = header.chat
        self._tokenizer = tokenizer
        self._with_usage = with_usage
        self._begun = [not header.chat] * num_choices
        head = header.fields("chat.completion.chunk" if header.chat else "text_completion")
        self._head = orjson.dumps(head)[:-1] + b',"choices":['
        text = b',"delta":{"content":' if header.chat else b',"text":'
        self._before_text = [
            self._head + b'{"index":%d' % choice + text for choice in range(num_choices)
        ]
        self._after_text = (b"}" if header.chat else b"") + b',"logprobs":'
        self._usage = b',"usage":null' if with_usage else b""
        self._plain_end = self._after_text + b'null,"finish_reason":null}]' + self._usage + b"}"

    def chunks(self, pieces: Iterable[Piece]) -> list[bytes]:
        """The JSON of each chunk these pieces make, in order."""
        out = []
        for piece in pieces:
            choice = piece.choice
            if not self._begun[choice]:
                self._begun[choice] = True
                out.append(self._role(choice))
            if piece.text or piece.entries:
                before = self._before_text[choice] + orjson.dumps(piece.text)
                if self._tokenizer is None:
                    out.append(before + self._plain_end)
                else:
                    out.append(
                        before + self._after_text + self._logprobs(piece.entries) + self._end()
                    )
            if piece.finish is not None:
                out.append(self._finish(choice, piece.finish))
        return out

    def usage(self, usage: Usage) -> list[bytes]:
        """The last chunk, if the client asked for it."""
        if not self._with_usage:
            return []
        return [self._head + b'],"usage":' + orjson.dumps(usage_body(usage)) + b"}"]

    def _role(self, choice: int) -> bytes:
        delta = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":' % choice
        return self._head + delta + _NULL + self._end()

    def _finish(self, choice: int, reason: str) -> bytes:
        body = b'"delta":{}' if self._chat else b'"text":""'
        finish = b'{"index":%d,%s,"logprobs":null' % (choice, body)
        return self._head + finish + self._end(orjson.dumps(reason))

    def _end(self, finish: bytes = _NULL) -> bytes:
        return b',"finish_reason":' + finish + b"}]" + self._usage + b"}"

    def _logprobs(self, entries: Sequence[TokenEntry]) -> bytes:
        assert self._tokenizer is not None
        shape = chat_logprobs if self._chat else text_logprobs
        return orjson.dumps(shape(entries, self._tokenizer))


def events(chunks: Sequence[bytes]) -> bytes:
    """Chunks as SSE events."""
    return b"data: " + b"\n\ndata: ".join(chunks) + b"\n\n" if chunks else b""


def waiting(stage: str, percent: int) -> str:
    """What a stream says while its model is being started: queued | loading 40 % | warm."""
    if stage == "loading":
        return f"loading {min(100, max(0, percent))} %"
    return "warm" if stage == "warm" else "queued"


def comments(notices: Sequence[str]) -> bytes:
    """Notices as SSE comments, which clients skip."""
    return b"".join(b": %s\n\n" % notice.encode() for notice in notices)


def error_event(error: DeepFlowError) -> bytes:
    """An error after the stream began."""
    return events([error_json(error)])


def error_json(error: DeepFlowError) -> bytes:
    """The error body as JSON."""
    return orjson.dumps(error_body(error))


def to_plain(chunk: bytes) -> Any:
    """A chunk's JSON as plain values, for another encoding."""
    return orjson.loads(chunk)
