"""The streaming client against real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import orjson

from deepflow.bench.client import Client, Endpoint


@contextlib.asynccontextmanager
async def answering(*parts: bytes, waits: float = 0.0) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A peer that answers every request with these bytes and closes; its address, and what it was sent."""
    seen: list[bytes] = []
    answers: list[asyncio.Task[None]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers.append(asyncio.current_task())  # type: ignore[arg-type]
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        seen.extend((head, await reader.readexactly(length)))
        await asyncio.sleep(waits)
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()
        with contextlib.suppress(ConnectionError):  # the client may have left
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/", seen
        await asyncio.gather(*answers)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


async def test_a_whole_answer_is_a_good_sample() -> None:
    """Each chunk's arrival, the usage and the end are in the sample; the request asks for all of that."""
    parts = (
        OK,
        b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n',
        b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,',
        b'"prompt_tokens_details":{"cached_tokens":3}}}\n\ndata: [DONE]\n\n',
    )
    async with answering(*parts) as (url, seen), Client.open(url, "m", api_key="k") as client:
        sample = await client.complete("hello", 2)
    assert sample.ok
    assert sample.text == "ab"
    assert (sample.prompt_tokens, sample.cached_tokens, sample.output_tokens) == (7, 3, 2)
    assert sample.sent_s < sample.times_s[0] < sample.times_s[1]
    head, body = seen[0], orjson.loads(seen[1])
    assert head.startswith(b"POST /v1/completions ")
    assert b"Bearer k" in head
    assert body["prompt"] == "hello"
    assert body["max_tokens"] == 2
    assert body["stream_options"] == {"include_usage": True}


async def test_the_chat_endpoint_gets_messages() -> None:
    """A chat request carries its prompt as the user's message."""
    async with (
        answering(OK) as (url, seen),
        Client.open(url, "m", endpoint=Endpoint.CHAT) as client,
    ):
        await client.complete("hello", 2)
    assert seen[0].startswith(b"POST /v1/chat/completions ")
    assert orjson.loads(seen[1])["messages"] == [{"role": "user", "content": "hello"}]


async def test_a_refusal_is_told_by_its_status() -> None:
    """An answer that is not 200 is a sample with that status and the body as its error."""
    refusal = (
        b'HTTP/1.1 429 Busy\r\nContent-Length: 16\r\nConnection: close\r\n\r\n{"error":"busy"}'
    )
    async with answering(refusal) as (url, _), Client.open(url, "m") as client:
        sample = await client.complete("hello", 2)
    assert not sample.ok
    assert sample.status == 429
    assert "busy" in sample.error


async def test_a_stream_that_breaks_off_is_not_whole() -> None:
    """Without its end marker an answer is no good, though tokens came."""
    parts = (OK, b'data: {"choices":[{"text":"a","finish_reason":"length"}]}\n\n')
    async with answering(*parts) as (url, _), Client.open(url, "m") as client:
        sample = await client.complete("hello", 2)
    assert sample.times_s
    assert not sample.ok
    assert sample.error == "the stream broke off"


async def test_nobody_there_is_a_sample_too() -> None:
    """A refused connection, and silence past the time-out, are failures without a status."""
    async with answering() as (url, _):
        pass
    async with Client.open(url, "m") as client:
        sample = await client.complete("hello", 2)
    assert (sample.ok, sample.status) == (False, 0)
    assert "Connect" in sample.error
    async with answering(OK, waits=0.5) as (url, _), Client.open(url, "m", timeout_s=0.1) as client:
        sample = await client.complete("hello", 2)
    assert (sample.status, sample.error) == (0, "timeout")
