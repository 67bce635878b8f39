"""The bytes of a stream, and the whole answer: exactly what OpenAI's clients parse."""

from __future__ import annotations

from dataclasses import replace

import orjson

from services.gateway.answer import Usage
from services.gateway.choices import Piece, TokenEntry
from services.gateway.openai.bodies import Header, error_body, whole
from services.gateway.openai.chunks import ChunkWriter, comments, error_event, events
from shared.errors import Overloaded
from shared.messages import TokenLogprobs
from shared.text.tokenizer import Tokenizer

CHAT = Header(id="chatcmpl-1", chat=True, model="m", created=7, fingerprint="fp_1")
TEXT = Header(id="cmpl-1", chat=False, model="m", created=7, fingerprint="fp_1")
USAGE = Usage(prompt=3, completion=2, cached=1)


def entry(token: int, offset: int = 0) -> TokenEntry:
    """A token with one alternative, itself."""
    return TokenEntry(
        token, TokenLogprobs(logprob=-0.5, top_ids=[token], top_logprobs=[-0.5]), offset
    )


def test_chat_stream_bytes() -> None:
    """Role first, then text, then an empty delta with the reason, then usage, with nulls where they belong."""
    writer = ChunkWriter(CHAT, 1, with_usage=True, tokenizer=None)
    chunks = writer.chunks([Piece(0, 'a"\n'), Piece(0, "", finish="stop")]) + writer.usage(USAGE)
    head = (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m",'
        b'"system_fingerprint":"fp_1","choices":['
    )
    assert events(chunks) == (
        head + b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        b'"finish_reason":null}],"usage":null}\n\n'
        + head + b'{"index":0,"delta":{"content":"a\\"\\n"},"logprobs":null,'
        b'"finish_reason":null}],"usage":null}\n\n'
        + head + b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n'
        + head + b'],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
        b'"prompt_tokens_details":{"cached_tokens":1}}}\n\n'
    )  # fmt: skip


def test_completion_stream_bytes() -> None:
    """No role; text chunks, then one without text and with the reason; no usage unless asked for."""
    writer = ChunkWriter(TEXT, 2, with_usage=False, tokenizer=None)
    chunks = writer.chunks([Piece(1, "é"), Piece(1, "", finish="length")]) + writer.usage(USAGE)
    head = (
        b'data: {"id":"cmpl-1","object":"text_completion","created":7,"model":"m",'
        b'"system_fingerprint":"fp_1","choices":['
    )
    assert events(chunks) == (
        head + '{"index":1,"text":"é","logprobs":null,"finish_reason":null}]}\n\n'.encode()
        + head + b'{"index":1,"text":"","logprobs":null,"finish_reason":"length"}]}\n\n'
    )  # fmt: skip


def test_each_choice_gets_its_role_and_its_end() -> None:
    """Interleaved choices each begin with the role and end with exactly one reason."""
    writer = ChunkWriter(CHAT, 2, with_usage=False, tokenizer=None)
    pieces = [
        Piece(0, "a"),
        Piece(1, "b"),
        Piece(1, "", finish="stop"),
        Piece(0, "", finish="length"),
    ]
    choices = [orjson.loads(chunk)["choices"][0] for chunk in writer.chunks(pieces)]
    assert [(c["index"], c["delta"], c["finish_reason"]) for c in choices] == [
        (0, {"role": "assistant", "content": ""}, None),
        (0, {"content": "a"}, None),
        (1, {"role": "assistant", "content": ""}, None),
        (1, {"content": "b"}, None),
        (1, {}, "stop"),
        (0, {}, "length"),
    ]


def test_logprobs_in_both_shapes(tokenizer: Tokenizer) -> None:
    """Chat logprobs carry bytes, so half a character can be shown; completions carry parallel arrays."""
    [token] = tokenizer.encode("a")
    half = tokenizer.encode("é")[0]
    writer = ChunkWriter(CHAT, 1, with_usage=False, tokenizer=tokenizer)
    _, chunk = writer.chunks([Piece(0, "aé", [entry(token), entry(half, 1)])])
    first, second = orjson.loads(chunk)["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }
    assert second["bytes"] == [0xC3]
    writer = ChunkWriter(TEXT, 1, with_usage=False, tokenizer=tokenizer)
    [chunk] = writer.chunks([Piece(0, "a", [entry(token, 4)])])
    assert orjson.loads(chunk)["choices"][0]["logprobs"] == {
        "tokens": ["a"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"a": -0.5}],
        "text_offset": [4],
    }


def test_an_impossible_token_still_makes_json(tokenizer: Tokenizer) -> None:
    """A logprob of minus infinity is written as OpenAI writes it."""
    odd = TokenEntry(5, TokenLogprobs(logprob=float("-inf")), 0)
    body = whole(CHAT, [Piece(0, "x", [odd], "stop")], 1, USAGE, tokenizer)
    assert orjson.loads(orjson.dumps(body)) == body
    assert body["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


def test_the_whole_answer() -> None:
    """What is not streamed joins the pieces of each choice."""
    pieces = [Piece(0, "a"), Piece(1, "x"), Piece(0, "b"), Piece(0, "", finish="stop")]
    body = whole(CHAT, [*pieces, Piece(1, "", finish="length")], 2, USAGE, None)
    assert body["object"] == "chat.completion"
    assert [c["message"]["content"] for c in body["choices"]] == ["ab", "x"]
    assert [c["finish_reason"] for c in body["choices"]] == ["stop", "length"]
    assert body["usage"]["total_tokens"] == 5
    assert [c["text"] for c in whole(TEXT, pieces, 2, USAGE, None)["choices"]] == ["ab", "x"]


def test_comments_and_errors() -> None:
    """Notices are SSE comments; an error is an event with OpenAI's error object."""
    assert comments(["queued"]) == b": queued\n\n"
    assert error_body(Overloaded("full"))["error"] == {
        "message": "full",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
    }
    assert error_event(Overloaded("full")).startswith(b'data: {"error":{"message":"full"')


def test_the_tier_is_answered_to_who_asked_for_one() -> None:
    """In the whole answer and in every chunk, the tier that it was given in; else there is no such field."""
    piece = Piece(0, "a", finish="stop")
    for header in (CHAT, TEXT):
        asked = replace(header, service_tier="flex")
        assert whole(asked, [piece], 1, USAGE, None)["service_tier"] == "flex"
        assert "service_tier" not in whole(header, [piece], 1, USAGE, None)
        writer = ChunkWriter(asked, 1, with_usage=True, tokenizer=None)
        for chunk in writer.chunks([piece]) + writer.usage(USAGE):
            assert orjson.loads(chunk)["service_tier"] == "flex"
