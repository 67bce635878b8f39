"""The NATS front door: the same requests, the same answers, as messages."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgpack
import nats as nats_py
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepflow.deploy.nats_config import NatsConfig
from services.gateway.producers import is_safe_reply, parse
from shared.bus import Bus
from shared.config import BusSettings
from shared.errors import InvalidRequest
from shared.messages import Accepted, ModelEntry, Request
from shared.permissions import KINDS
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


async def test_the_tenant_is_the_producers_account(
    tmp_path: Path, cache: Path, entry: ModelEntry
) -> None:
    """On the generated configuration the server names the account, whatever the producer writes in its place."""
    passwords = {kind: secrets.token_hex(8) for kind in KINDS}
    config = NatsConfig(
        realm="deepflow", host="127.0.0.1", port=-1, store_dir=str(tmp_path / "js"),
        ports_dir=str(tmp_path / "nats"), passwords=passwords, producers={"acme": "a", "globex": "g"},
    )  # fmt: skip
    server = NatsServer(tmp_path / "nats", extra=config.render())
    server.start()
    tenants: list[str] = []

    async def refuse(request: Request) -> Accepted:
        tenants.append(request.tenant)
        raise InvalidRequest("seen")

    async with AsyncExitStack() as stack:
        stack.callback(server.stop)
        buses = {}
        for kind in ("worker", "scheduler"):
            settings = BusSettings(url=server.url, user=kind, password=passwords[kind], grace_s=1.0)
            inbox = "te" if kind == "worker" else kind
            buses[kind] = await Bus.connect(settings, name=kind, inbox=inbox)
            stack.push_async_callback(buses[kind].close)
        await (await buses["worker"].table("models")).put(entry.name, entry)
        scheduler = buses["scheduler"]
        await scheduler.serve(scheduler.subjects.request("*"), (Request,), refuse)
        own = BusSettings(
            url=server.url, user="gateway", password=passwords["gateway"], grace_s=1.0
        )
        gateway = RunningGateway(server.url, cache, bus=own)
        await gateway.start()
        stack.push_async_callback(gateway.stop)

        forged = b'Nats-Request-Info: {"acc":"globex"}\r\n'
        for headers in (b"", forged, forged * 2, forged.lower() + forged):
            assert b"seen" in await ask_raw(server.url, "acme", "a", headers)
        assert b"seen" in await ask_raw(server.url, "globex", "g", b"")
    assert tenants == ["acme"] * 4 + ["globex"]


async def ask_raw(url: str, user: str, password: str, headers: bytes) -> bytes:
    """What the server sends until the answer's end, for one prompt with any header lines: no client would send them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    options = {"verbose": False, "headers": True, "user": user, "pass": password}
    head = b"NATS/1.0\r\n" + headers + b"\r\n"
    body = orjson.dumps({"prompt": "Hello"})
    writer.write(b"CONNECT " + orjson.dumps(options) + b"\r\nSUB answers 1\r\n")
    sizes = b"%d %d" % (len(head), len(head) + len(body))
    writer.write(b"HPUB %s answers %s\r\n%s%s\r\n" % (PROMPT.encode(), sizes, head, body))
    async with asyncio.timeout(10):
        answer = await reader.readuntil(b" 0\r\n\r\n")  # an empty message
    writer.close()
    await writer.wait_closed()
    return answer


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
