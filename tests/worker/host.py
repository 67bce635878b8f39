"""A host for tests: pod hosts with TEs of a tiny model, the cache service beside them, and the arena they share."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shared.arena.place import read_host
from tests.nats_server import NatsServer
from tests.worker.peers import Peer, Worker, tokens

PAGE = 16
LONG = [3 + (7 * i + i // 50) % 500 for i in range(4007)]  # 250 full pages before its last token


class CacheService:
    """A cache service process, which owns the arena of `folder`."""

    def __init__(self, url: str, folder: Path, **variables: str) -> None:
        self._folder = folder
        self._env = {
            **os.environ,
            "DEEPFLOW_NATS_URL": url,
            "DEEPFLOW_HOME": str(folder),
            "DEEPFLOW_CACHE": str(folder / "cache"),
            "DEEPFLOW_ARENA_DIR": str(folder / "arena"),
            "DEEPFLOW_ARENA_BYTES": str(64 << 20),
            "DEEPFLOW_SEGMENT_BYTES": str(4 << 20),
            "DEEPFLOW_GRACE_S": "2",
            "DEEPFLOW_PARENT_PID": str(os.getpid()),
            **variables,
        }
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it, and wait until the folder names its host."""
        with (self._folder / "cache.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "services.cache"],
                env=self._env,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        async with asyncio.timeout(20):
            while not read_host(self._folder / "arena"):
                assert self._process.poll() is None, (self._folder / "cache.log").read_text()
                await asyncio.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal, and wait for its end."""
        assert self._process is not None
        self.send(number)
        self._process.wait(20)


class Host:
    """A host: its cache service, and pod hosts whose TEs share the arena."""

    def __init__(self, server: NatsServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.arena = folder / "arena"
        self.cache = CacheService(server.url, folder)
        self.workers: list[Worker] = []

    def worker(self, name: str, **variables: str) -> Worker:
        """A pod host, started, with one TE."""
        worker = Worker(
            self.server.url,
            self.folder / name,
            **{
                "DEEPFLOW_ARENA_DIR": str(self.arena),
                "DEEPFLOW_KV_TOKENS": "16384",
                "DEEPFLOW_DTYPE": "w8a8",
                **variables,
            },
            DEEPFLOW_FETCH_MIN_MS="0",
        )
        worker.start()
        self.workers.append(worker)
        return worker

    def stop(self) -> None:
        """End everything."""
        for worker in self.workers:
            worker.stop()
        self.cache.end()


async def counter(peer: Peer, te: str, name: str, least: float = 1) -> float:
    """Wait until a TE's beats tell of a counter of at least so much; the value."""
    await peer.until(lambda: te in peer.beats and peer.beats[te].counters.get(name, 0) >= least)
    return peer.beats[te].counters[name]


async def settled(peer: Peer, te: str, timeout_s: float = 10) -> None:
    """Wait until nothing of a TE is in use, leased or moving."""
    async with asyncio.timeout(timeout_s):
        while True:
            ledger = await peer.freed(te)
            if not ledger["leased"] and not ledger["moving"]:
                return
            await asyncio.sleep(0.05)


async def generate(peer: Peer, te: str, name: str, **fields: object) -> tuple[list[int], int]:
    """Run a request to its end: its tokens, and how many tokens of its prompt were found cached."""
    fields = {"prompt": LONG, **fields}
    await peer.send(te, peer.request(name, **fields))  # type: ignore[arg-type]
    deltas = await peer.end(name)
    assert deltas[-1].finish == "length", deltas[-1]
    return tokens(deltas), deltas[0].cached or 0


@asynccontextmanager
async def pair(host: Host, **variables: str) -> AsyncIterator[tuple[Peer, str, str]]:
    """Two TEs of the host, and somebody to talk to them."""
    host.worker("worker", DEEPFLOW_WORKERS="2", **variables)
    async with Peer.on(host.server.url) as peer:
        one = await peer.ready()
        other = await peer.ready(but=one)
        yield peer, one, other
        await settled(peer, one)
        await settled(peer, other)
