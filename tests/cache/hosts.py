"""What is around a cache service that owns an arena, in tests: its folder, and the TEs that write and read there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import urllib.request
from collections.abc import AsyncIterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from shared.arena.place import read_host
from shared.arena.reader import Reader
from shared.arena.writer import Writer
from shared.bus import Bus
from shared.messages import Keep, StatusQuery, StatusReply
from shared.rtc_messages import (
    BlocksDump,
    BlocksQuery,
    Commit,
    Copied,
    Copy,
    Populate,
    Populated,
    QueryPopulate,
    Slot,
)
from tests.nats_server import NatsServer
from tests.scheduler.players import MODEL, eventually, process, status, wait_ready

RECIPE = "r"
SLOT_BYTES = 64 * 1024
SEGMENT_BYTES = 16 * SLOT_BYTES + 16 * 4096
SLOW_US = 1_000_000  # to compute a page: anything is better


def pages(name: str, number: int) -> list[bytes]:
    """The hashes of a chain of pages."""
    return [blake2b(f"{name}/{n}".encode(), digest_size=16).digest() for n in range(number)]


def content(page_hash: bytes) -> bytes:
    """What the page of this name holds, wherever it is."""
    return np.random.default_rng(int.from_bytes(page_hash, "big")).bytes(SLOT_BYTES)


class Host:
    """A cache service that owns an arena, seen from the outside."""

    def __init__(
        self,
        bus: Bus,
        folder: Path,
        child: asyncio.subprocess.Process,
        cache: str,
        metrics_port: int,
    ) -> None:
        self.bus = bus
        self.folder = folder
        self.child = child
        self.cache = cache  # its id
        self.metrics_port = metrics_port
        self.name = read_host(folder)

    async def status(self) -> dict[str, Any]:
        """What it says of its arena."""
        body: dict[str, Any] = (await status(self.bus, "cache", self.cache))["arena"]
        return body

    async def ledger(self) -> dict[str, Any]:
        """Its ledger, checked: every slot is accounted for."""
        body = await ledger(self.bus, self.cache)
        for row in body["arena"].values():
            assert row["total"] == sum(row[state] for state in row if state != "total")
        return body

    async def dump(self) -> BlocksDump:
        """Its whole index."""
        return await self.bus.request(
            self.bus.subjects.blocks_dump(self.cache),
            BlocksQuery(by="test", model=MODEL),
            BlocksDump,
            timeout_s=5,
        )

    async def counter(self, name: str, **labels: str) -> float:
        """The value of one of its metrics."""
        page = await asyncio.to_thread(_scrape, self.metrics_port)
        values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }
        return values.get((name, frozenset(labels.items())), 0.0)

    async def copy(self, te: str, hashes: Sequence[bytes], **fields: Any) -> Copied:
        """Asks for slots."""
        kind: dict[str, Any] = {"model": MODEL, "recipe": RECIPE, "slot_bytes": SLOT_BYTES}
        ask = Copy(te=te, hashes=list(hashes), **{**kind, **fields})
        return await self.bus.request(
            self.bus.subjects.rtc("copy", self.name), ask, Copied, timeout_s=5
        )

    async def populate(self, hashes: Sequence[bytes], **fields: Any) -> Populated:
        """Asks where pages are; the first answer."""
        kind: dict[str, Any] = {"model": MODEL, "recipe": RECIPE, "slot_bytes": SLOT_BYTES}
        values: dict[str, Any] = {"te": "te-x", "page_us": SLOW_US, "load_us": 1}
        ask = Populate(hashes=list(hashes), **{**kind, **values, **fields})
        return await self.bus.request(
            self.bus.subjects.rtc("populate", self.name), ask, Populated, timeout_s=20
        )

    async def query(self, ticket: str, wait_ms: int = 10_000) -> Populated:
        """Asks how a ticket is getting on."""
        ask = QueryPopulate(ticket=ticket, wait_ms=wait_ms)
        return await self.bus.request(
            self.bus.subjects.rtc("query", self.name), ask, Populated, timeout_s=20
        )

    async def fetched(self, hashes: Sequence[bytes], **fields: Any) -> Populated:
        """The answer once nothing more will come."""
        found = await self.populate(hashes, **fields)
        while found.ticket:
            found = await self.query(found.ticket)
        return found

    def read(self, slots: Sequence[Slot], hashes: Sequence[bytes]) -> int:
        """How many of the first pages are in these slots; what is read is what was written, or nothing."""
        reader = Reader(self.folder)
        out = bytearray(SLOT_BYTES)
        try:
            for number, (slot, page_hash) in enumerate(zip(slots, hashes, strict=False)):
                if not reader.read(slot, page_hash, out):
                    return number
                assert bytes(out) == content(page_hash)
            return len(slots)
        finally:
            reader.close()

    async def holds(self, hashes: Sequence[bytes], number: int) -> None:
        """Waits until the arena itself has exactly so many of the first pages, and they can be read."""

        async def there() -> bool:
            found = await self.populate(hashes, page_us=2)  # only what is here is worth it
            return len(found.slots) == self.read(found.slots, hashes) == number

        await eventually(there)


class Writing:
    """Plays a TE that writes to the arena of its host. Use as a context manager."""

    def __init__(self, host: Host, te: str) -> None:
        self.host = host
        self.te = te
        self.writer = Writer(host.folder)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    async def write(self, hashes: Sequence[bytes], keep: Keep | None = None) -> int:
        """Copies pages to the arena; how many it got slots for."""
        copied = await self.host.copy(self.te, hashes, held=self.writer.held, keep=keep)
        returned = self.writer.lock(copied.granted)
        written = []
        for slot, page_hash in zip(copied.slots, hashes, strict=True):
            if slot is not None:
                assert self.writer.write(slot, page_hash, content(page_hash))
                written.append(slot)
        returned += self.writer.give_back(copied.wanted)
        bus = self.host.bus
        await bus.publish(
            bus.subjects.rtc("commit", self.host.name),
            Commit(te=self.te, written=written, returned=returned),
        )
        return len(written)


async def ledger(bus: Bus, cache: str) -> dict[str, Any]:
    """The ledger of a cache service."""
    reply = await bus.request(
        bus.subjects.status("cache", cache),
        StatusQuery(verb="ledger"),
        StatusReply,
        timeout_s=5,
    )
    body: dict[str, Any] = json.loads(reply.body)
    return body


@contextlib.asynccontextmanager
async def running(nats: NatsServer, bus: Bus, folder: Path, **env: str) -> AsyncIterator[Host]:
    """A cache service that owns the arena in `folder`, 64 slots by default; killed at the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = {
        "DEEPFLOW_METRICS_PORT": str(port),
        "DEEPFLOW_ARENA_DIR": str(folder),
        "DEEPFLOW_ARENA_BYTES": str(4 * SEGMENT_BYTES),
        "DEEPFLOW_SEGMENT_BYTES": str(SEGMENT_BYTES),
        **env,
    }
    async with process("cache", nats, **env) as (child, cache):
        await wait_ready(bus, "cache", cache)
        yield Host(bus, folder, child, cache, port)


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text: str = answer.read().decode()
        return text


async def acquainted(host: Host, other: Host) -> None:
    """Waits until `host` knows which pages `other` has."""

    async def knows() -> bool:
        body = await status(host.bus, "cache", host.cache)
        dump = await other.dump()
        return bool(body["tes"].get(other.cache) == len(dump.hashes) and not body["unsynced"])

    await eventually(knows)


async def nothing_is_left(*hosts: Host) -> None:
    """Waits until no lease is held and nothing is on its way, and the slots balance."""
    for host in hosts:

        async def at_rest(host: Host = host) -> bool:
            body = await host.ledger()
            names = ("leases", "leased_bytes", "tickets", "moving_pages", "moving_bytes")
            writing = [row["writing"] for row in body["arena"].values()]
            return not any(body[name] for name in names) and not any(writing)

        await eventually(at_rest, within_s=15)
