"""The NATS front door: the same requests, the same answers, as messages."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import msgpack
import nats as nats_py
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.producers import is_safe_reply, parse
from shared.errors import InvalidRequest
from shared.subjects import Subjects
from tests.gateway.peers import MODEL, Peers
from tests.gateway.running import RunningGateway
from tests.nats_server import NatsServer

HELLO = [{"role": "user", "content": "Hello"}]
PROMPT = Subjects("deepflow").prompt(MODEL)


async def ask(url: str, data: bytes, subject: str = PROMPT) -> list[bytes]:
    """All messages of an answer; the empty one at the end is checked and left out."""
    client = await nats_py.connect(url)
    try:
        inbox = client.new_inbox()
        answers = await client.subscribe(inbox)
        await client.publish(subject, data, reply=inbox)
        messages = []
        while (message := await answers.next_msg(timeout=10)).data:
            messages.append(message.data)
        return messages
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("encode", "decode"), [(orjson.dumps, orjson.loads), (msgpack.packb, msgpack.unpackb)]
)
async def test_a_streamed_chat(
    gateway: RunningGateway, nats: NatsServer, peers: Peers, encode: Any, decode: Any
) -> None:
    """Each chunk of the stream is a message in the encoding of the request; an empty one ends it."""
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    chunks = [decode(message) for message in await ask(nats.url, encode(body))]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == peers.text
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == len(peers.ids())


async def test_a_whole_completion(gateway: RunningGateway, nats: NatsServer, peers: Peers) -> None:
    """Without `stream` the whole answer is one message."""
    [message] = await ask(nats.url, orjson.dumps({"prompt": "Hello", "max_tokens": 3}))
    assert orjson.loads(message)["choices"][0]["text"] == "Hello"
    assert peers.requests[0].tenant == "local"


async def test_errors_are_messages(gateway: RunningGateway, nats: NatsServer) -> None:
    """Whatever is wrong is told as an error object, and the answer still ends."""
    cases = [
        (PROMPT, b"", "invalid_request"),
        (PROMPT, b"{", "invalid_request"),
        (PROMPT, orjson.dumps([1]), "invalid_request"),
        (PROMPT, orjson.dumps({"messages": HELLO, "n": 0}), "invalid_request"),
        (PROMPT, orjson.dumps({"messages": HELLO, "model": "x"}), "invalid_request"),
        (Subjects("deepflow").prompt("x"), orjson.dumps({"prompt": "a"}), "model_not_found"),
        ("deepflow.v1.prompt.=zz", orjson.dumps({"prompt": "a"}), "invalid_request"),
    ]
    for subject, data, code in cases:
        [message] = await ask(nats.url, data, subject)
        assert orjson.loads(message)["error"]["code"] == code
    [message] = await ask(nats.url, msgpack.packb({"messages": b"\xff"}))
    assert msgpack.unpackb(message)["error"]["param"] == "messages"


async def test_the_documented_example_works(
    gateway: RunningGateway, nats: NatsServer, peers: Peers
) -> None:
    """examples/nats_producer.py, as a reader would run it, prints the answer."""
    example = Path(__file__).parents[2] / "examples" / "nats_producer.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(example), nats.url, MODEL, "Hello?", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0
    assert out.decode() == peers.text


@pytest.mark.parametrize(
    ("reply", "safe"),
    [
        ("_INBOX.abc.1", True),
        ("acme.answers.7", True),
        ("", False),
        ("deepflow.v1.task.te-1", False),
        ("deepflow", False),
        ("$JS.API.STREAM.DELETE.x", False),
        ("$KV.deepflow-keys.local", False),
        ("a.*.b", False),
        ("a.>", False),
        ("a..b", False),
        ("a b", False),
        ("a\r\nPUB x", False),
    ],
)
def test_which_reply_subjects_are_used(reply: str, safe: bool) -> None:
    """An answer never goes to a subject of ours, to one of the server's, or to a pattern."""
    assert is_safe_reply(reply, "deepflow") is safe


@given(st.binary(max_size=64))
def test_hostile_bytes_are_refused(data: bytes) -> None:
    """A body of any bytes is values, or an InvalidRequest."""
    with contextlib.suppress(InvalidRequest):
        parse(data)
