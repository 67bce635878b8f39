"""The gateway as a process: it answers, ends cleanly on SIGTERM, and leaves nobody behind on kill -9."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import aiohttp
import orjson
import psutil

from tests.gateway.peers import MODEL, Peers
from tests.nats_server import NatsServer


class Process:
    """`python -m services.gateway` on free ports."""

    def __init__(self, nats: NatsServer, cache: Path, **env: str) -> None:
        self.env = {
            **os.environ,
            "DEEPFLOW_NATS_URL": nats.url,
            "DEEPFLOW_CACHE": str(cache),
            "DEEPFLOW_HOME": str(cache / "home"),
            "DEEPFLOW_PORT": "0",
            **env,
        }
        self.url = ""

    async def start(self) -> None:
        """Run until it says where it listens."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.gateway", env=self.env, stderr=asyncio.subprocess.PIPE
        )
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            while line := await self.process.stderr.readline():
                event = orjson.loads(line)
                if event["event"] == "gateway_listening":
                    self.url = event["url"]
                    return
        raise AssertionError("it ended")

    async def end(self, number: int) -> int:
        """Send a signal, and the exit code."""
        self.process.send_signal(number)
        async with asyncio.timeout(10):
            _, code = await asyncio.gather(self.process.stderr.read(), self.process.wait())  # type: ignore[union-attr]
        return code


async def test_it_answers_and_ends_cleanly(nats: NatsServer, cache: Path, peers: Peers) -> None:
    """A real process streams a chat, and SIGTERM ends it with code 0 and without a child."""
    gateway = Process(nats, cache)
    await gateway.start()
    children = psutil.Process(gateway.process.pid).children()
    assert children
    async with aiohttp.ClientSession(gateway.url) as http:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        async with http.post("/v1/chat/completions", json=body) as response:
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
    assert await gateway.end(signal.SIGTERM) == 0
    assert not any(child.is_running() for child in children)


async def test_kill_leaves_no_child(nats: NatsServer, cache: Path) -> None:
    """The tokenizing processes end with their gateway, even when it had no time to tell them."""
    gateway = Process(nats, cache)
    await gateway.start()
    children = psutil.Process(gateway.process.pid).children()
    await gateway.end(signal.SIGKILL)
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=5)
    assert not alive


async def test_it_refuses_an_open_port_without_keys(nats: NatsServer, cache: Path) -> None:
    """A reachable address without keys ends the start, naming the variable."""
    env = {**Process(nats, cache).env, "DEEPFLOW_HOST": "0.0.0.0"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", env=env, stderr=asyncio.subprocess.PIPE
    )
    _, err = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode != 0
    assert b"DEEPFLOW_API_KEYS" in err
