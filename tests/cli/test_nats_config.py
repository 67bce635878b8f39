"""The generated nats-server configuration: what each user may and may not do, tried on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import nats as client
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from deepflow.cli.home import Home
from deepflow.cli.nats_server import PRODUCER, NatsServer
from deepflow.deploy import nats_config
from shared.bus import Bus
from shared.config import BusSettings
from shared.errors import Unavailable
from shared.job_messages import JobCall
from shared.messages import Registration
from shared.permissions import KINDS, permissions
from shared.subjects import Subjects

ROOT = Path(__file__).resolve().parents[2]
ON = Subjects("deepflow")
Connect = Callable[[str], Coroutine[None, None, Client]]
# The process name of each user's inboxes, where it is not the user's.
INBOX = {"worker": "te"}


class Server:
    """The embedded server, as the launcher starts it."""

    def __init__(self, server: NatsServer, url: str) -> None:
        self.inner = server
        self.url = url
        self.errors: asyncio.Queue[str] = asyncio.Queue()

    def password(self, user: str) -> str:
        """Of a service or of the producer."""
        credentials = self.inner.credentials
        return credentials.producer if user == PRODUCER else credentials.services[user]

    async def connect(self, user: str) -> Client:
        """A bare connection as `user`; what the server objects to is collected."""

        async def on_error(error: Exception) -> None:
            self.errors.put_nowait(str(error).lower())

        return await client.connect(
            self.url,
            user=user,
            password=self.password(user),
            error_cb=on_error,
            inbox_prefix=f"_INBOX.{INBOX.get(user, user)}".encode(),
            allow_reconnect=False,
        )


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with the generated configuration."""
    home = Home(tmp_path / "home", tmp_path / "cache")
    assert home.take()
    embedded = NatsServer(home.nats, "deepflow")
    with (tmp_path / "nats.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*embedded.command(), stderr=log)
    try:
        async with asyncio.timeout(10):
            while (url := embedded.url()) is None:
                assert process.returncode is None, (tmp_path / "nats.log").read_text()
                await asyncio.sleep(0.01)
        yield Server(embedded, url)
    finally:
        process.terminate()
        await process.wait()
        home.release()


def test_the_committed_file_is_the_generated_one() -> None:
    """deploy/nats/nats.conf is what the generator makes of shared/permissions.py."""
    committed = (ROOT / "deploy/nats/nats.conf").read_text()
    assert committed == nats_config.compose().render(), (
        "python -m deepflow.deploy.nats_config > deploy/nats/nats.conf"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_user_may_do_everything(kind: str) -> None:
    """Nobody has a wildcard over nouns, over JetStream, or over another user's inbox."""
    may = permissions(kind, "deepflow")
    for subject in (*may.publish, *may.subscribe):
        assert subject.split(".")[0] != ">"
        assert not subject.startswith(("deepflow.v1.>", "deepflow.v1.*", "$JS.API.>", "$SYS"))
    inboxes = [subject for subject in may.subscribe if subject.startswith("_INBOX")]
    assert all(inbox.split(".")[1] not in ("*", ">") for inbox in inboxes)
    assert not [subject for subject in may.publish if subject.startswith("_INBOX")]


def test_only_their_owners_touch_the_secret_tables() -> None:
    """Tenants' secrets are read and written by gateways alone."""
    for kind in KINDS:
        keys = [subject for subject in permissions(kind, "deepflow").publish if "-keys" in subject]
        assert bool(keys) == (kind == "gateway")


def test_no_service_publishes_prompts() -> None:
    """A prompt always crosses accounts, where the server writes the account's name over a forged one."""
    for kind in KINDS:
        assert ON.prompt("*") not in permissions(kind, "deepflow").publish


@pytest.mark.service
@pytest.mark.parametrize(
    ("user", "subject"),
    [
        ("gateway", ON.prompt("m")),  # nor anybody else: see above
        ("gateway", ON.tokens("gateway-1")),  # tokens come from TEs
        ("gateway", ON.beat("te", "te-1")),  # nobody beats for another kind
        ("scheduler", ON.request("m")),  # requests come from gateways
        ("scheduler", ON.beat("gateway", "gateway-1")),
        ("worker", ON.task("te-1")),  # tasks come from JEs
        ("worker", ON.request("m")),
        ("cache", ON.task("te-1")),
        ("cache", ON.tokens("gateway-1")),
        ("cache", ON.blocks("m", "te-1")),
        ("operator", ON.request("m")),
        ("operator", ON.cancel("te-1")),
        ("gateway", "_INBOX.scheduler.x"),  # an answer that nobody asked for
        ("scheduler", "$JS.API.STREAM.DELETE.KV_deepflow-models"),
        ("cache", f"$KV.{ON.table('models')}.m"),
    ],
)
async def test_a_user_may_not_publish_what_is_anothers(
    server: Server, user: str, subject: str
) -> None:
    """The server refuses it and says so."""
    connection = await server.connect(user)
    await connection.publish(subject, b"x")
    async with asyncio.timeout(5):
        assert "permissions violation" in await server.errors.get()
    await connection.close()


@pytest.mark.service
@pytest.mark.parametrize(
    ("user", "subject"),
    [
        ("gateway", ON.request("m")),
        ("gateway", ON.task("te-1")),
        ("scheduler", ON.tokens("gateway-1")),
        ("worker", ON.tokens("gateway-1")),
        ("cache", ON.task("*")),
        ("operator", ON.prompt("*")),
        ("gateway", ">"),
        ("worker", "_INBOX.gateway.>"),
    ],
)
async def test_a_user_may_not_hear_what_is_anothers(
    server: Server, user: str, subject: str
) -> None:
    """The server refuses the subscription and says so."""
    connection = await server.connect(user)
    await connection.subscribe(subject)
    async with asyncio.timeout(5):
        assert "permissions violation" in await server.errors.get()
    await connection.close()


@pytest.mark.service
@pytest.mark.parametrize(
    ("user", "name"),
    [
        *[("gateway", name) for name in ("keys", "caches", "jobs", "files")],
        *[("scheduler", name) for name in ("jobs", "files", "predictors")],
        *[("worker", name) for name in ("models", "registrations")],
    ],
)
async def test_a_service_may_write_its_tables(server: Server, user: str, name: str) -> None:
    """Opening, creating, writing, reading and deleting."""
    async with connected(server, user) as bus:
        table = await bus.table(name)
        entry = Registration(kind=user, id=f"{user}-1", host="here", pid=1)
        await table.put(entry.id, entry)
        assert await table.get(entry.id, Registration) == entry
        assert entry.id in await table.all(Registration)
        await table.delete(entry.id)


@pytest.mark.service
@pytest.mark.parametrize(
    ("user", "name"),
    [("gateway", "models"), ("scheduler", "models"), ("scheduler", "registrations")],
)
async def test_a_service_may_only_read_what_is_anothers(
    server: Server, user: str, name: str
) -> None:
    """Opening and reading; a write is refused."""
    entry = Registration(kind="te", id="te-1", host="here", pid=1)
    async with connected(server, "worker") as worker:
        await (await worker.table(name)).put(entry.id, entry)
    async with connected(server, user) as bus:
        table = await bus.table(name)
        assert await table.get(entry.id, Registration) == entry
        assert await table.all(Registration) == {entry.id: entry}
        with pytest.raises(Unavailable):
            await table.put(entry.id, entry)


@contextlib.asynccontextmanager
async def connected(server: Server, user: str) -> AsyncIterator[Bus]:
    """A bus as the services of this kind use it."""
    settings = BusSettings(url=server.url, user=user, password=server.password(user), grace_s=1.0)
    bus = await Bus.connect(settings, name=f"{user}-test", inbox=INBOX.get(user, user))
    try:
        yield bus
    finally:
        await bus.close()


@pytest.mark.service
async def test_a_gateway_puts_jobs_and_a_je_settles_them(server: Server) -> None:
    """What a gateway puts into the work queue a JE takes, holds, releases and settles; a gateway may not take it."""

    async def connect(user: str) -> Bus:
        settings = BusSettings(url=server.url, user=user, password=server.password(user))
        return await Bus.connect(settings, name=user)

    gateway, je = await connect("gateway"), await connect("scheduler")
    try:
        theirs, ours = await gateway.work_queue(), await je.work_queue()
        await theirs.put("batch", "j1", JobCall(id="j1"))
        entry = await ours.take("batch", JobCall, 2.0)
        assert entry is not None
        await entry.hold()
        await entry.release()
        entry = await ours.take("batch", JobCall, 2.0)
        assert entry is not None
        await entry.done()
        await je.flush()
        assert await ours.take("batch", JobCall, 0.3) is None
        assert (gateway.num_refused, je.num_refused) == (0, 0)
        with pytest.raises(Unavailable):
            await theirs.take("batch", JobCall, 0.3)
    finally:
        await gateway.close()
        await je.close()


@pytest.mark.service
async def test_a_producer_gets_a_stream_and_is_named(server: Server) -> None:
    """Its account may publish prompts; many messages come back, and the server tells the gateway the account."""
    gateway, producer = await server.connect("gateway"), await server.connect(PRODUCER)
    told: list[str] = []
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(message: Msg) -> None:
        told.append(json.loads((message.headers or {})["Nats-Request-Info"])["acc"])
        for index in range(20):
            await gateway.publish(message.reply, str(index).encode())

    async def hear(message: Msg) -> None:
        answers.put_nowait(message.data)

    await gateway.subscribe(ON.prompt("*"), queue="gateway", cb=serve)
    await gateway.flush()
    inbox = producer.new_inbox()
    await producer.subscribe(inbox, cb=hear)
    await producer.publish(ON.prompt("m"), b"hello", reply=inbox)
    async with asyncio.timeout(5):
        heard = [await answers.get() for _ in range(20)]
    assert heard == [str(index).encode() for index in range(20)]
    assert told == [PRODUCER]
    assert server.errors.empty()
    await producer.close()
    await gateway.close()


@pytest.mark.service
async def test_a_producer_reaches_nothing_else(server: Server) -> None:
    """Its account is an island but for the prompts: it hears no beats, and nobody hears its tasks."""
    worker, producer = await server.connect("worker"), await server.connect(PRODUCER)
    heard: list[str] = []

    async def hear(message: Msg) -> None:
        heard.append(message.subject)

    await worker.subscribe(ON.task("te-1"), cb=hear)
    await producer.subscribe(">", cb=hear)
    await worker.flush()
    await producer.flush()
    await producer.publish(ON.task("te-1"), b"x")
    await producer.flush()
    await worker.publish(ON.beat("te", "te-1"), b"x")
    await worker.flush()
    await asyncio.sleep(0.1)
    assert heard == [ON.task("te-1")]  # its own, on its own island
    await producer.close()
    await worker.close()


@pytest.mark.service
@pytest.mark.parametrize("options", [{}, {"user": "gateway", "pass": "wrong"}])
async def test_the_bus_needs_a_password(server: Server, options: dict[str, str]) -> None:
    """Nobody gets in without one, and a password of another run is no password."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    assert (await reader.readline()).startswith(b"INFO")
    writer.write(b"CONNECT " + json.dumps({"verbose": False, **options}).encode() + b"\r\nPING\r\n")
    async with asyncio.timeout(5):
        assert b"Authorization Violation" in await reader.readline()
    writer.close()
    await writer.wait_closed()
