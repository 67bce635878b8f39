"""The whole platform as processes, started and stopped as a user does: `deepflow up` in a home of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil


def free_port() -> int:
    """A loopback port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Stack:
    """One running instance. Its environment is the test's own, with a home of its own."""

    def __init__(
        self, home: Path, cache: Path, *, models: list[str], workers: int | str = 1, pd: str = ""
    ) -> None:
        self.home = home
        self.models = models
        # Of each model: prefill and decode TEs as `pd` says (1p1d), or colocated ones, at least the first of 0..4.
        self.num_tes = sum(map(int, re.findall(r"\d+", pd or str(workers).partition("..")[0])))
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("DEEPFLOW_")},
            "DEEPFLOW_HOME": str(home),
            "DEEPFLOW_CACHE": str(cache),
            "DEEPFLOW_GRACE_S": "10",
        }
        self._arguments = [
            *(word for model in models for word in ("--model", model)),
            *(("--pd", pd) if pd else ("--workers", str(workers))),
            *("--port", str(free_port())),
        ]
        self._log = home.parent / f"{home.name}.out"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    # ------------------------------------------------------------------------------------------------ life

    def start(self) -> None:
        """`deepflow up`, until its ready line."""
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deepflow.cli.main", "up", *self._arguments],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        give_up = time.monotonic() + 90
        while not self.url or self.get("/ready")[0] != 200:
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < give_up, self.output()
            found = re.search(r"http://127\.0\.0\.1:\d+", self.output())
            self.url = found[0] if found else ""
            time.sleep(0.05)
        self.wait_tes()

    def stop(self) -> int:
        """Ctrl-C, and the exit code; kills what does not end within 40 s."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        return self.process.returncode

    def output(self) -> str:
        """What `deepflow up` printed."""
        return self._log.read_text(errors="replace")

    def logs(self) -> str:
        """The tails of all services' logs, for a failing test's message."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted((self.home / "logs").glob("*.log"))
        )

    # ------------------------------------------------------------------------------------------------- look

    def run(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A `deepflow` command against this instance."""
        return subprocess.run(
            [sys.executable, "-m", "deepflow.cli.main", *arguments],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def status(self) -> dict[str, Any]:
        """`deepflow status --json`."""
        result = self.run("status", "--json")
        assert result.returncode == 0, result.stderr
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    def tes(self) -> list[dict[str, Any]]:
        """The ready TEs that answer the gateway; asked over HTTP, because the command line takes a second a time."""
        status, body = self.get("/debug/status")
        services = body["services"] if status == 200 else []
        return [s for s in services if s["kind"] == "te" and s.get("state") == "ready"]

    def wait_tes(self, num: int | None = None) -> list[dict[str, Any]]:
        """Wait until `num` TEs (all that were asked for) are ready."""
        wanted = self.num_tes * len(self.models) if num is None else num
        give_up = time.monotonic() + 60
        while len(tes := self.tes()) < wanted:
            assert time.monotonic() < give_up, (tes, self.logs())
            time.sleep(0.2)
        return tes

    def service_pid(self, name: str) -> int:
        """The process id of a service's first process."""
        return next(int(s["pid"]) for s in self.status()["services"] if s["name"] == name)

    def get(self, path: str) -> tuple[int, Any]:
        """GET from the gateway: status and decoded JSON (or text). (0, reason) when nobody answers."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                body = answer.read()
                status = answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace")
        except (OSError, ValueError) as error:
            return 0, str(error)
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode(errors="replace")

    def ledgers(self) -> dict[str, dict[str, Any]]:
        """The KV ledger of each TE, by TE."""
        status, body = self.get("/debug/kv/ledger")
        assert status == 200, body
        return {te["id"]: te for te in body["ledgers"] if te["kind"] == "te"}

    def arenas(self) -> list[dict[str, Any]]:
        """The slots of each kind of page in the arena, as the cache service tells."""
        status, body = self.get("/debug/kv/ledger")
        assert status == 200, body
        caches = [one for one in body["ledgers"] if one["kind"] == "cache"]
        return [kind for cache in caches for kind in cache["arena"].values()]

    def wait_idle(self, within_s: float = 5.0) -> dict[str, dict[str, Any]]:
        """Wait until no TE holds live blocks; the balanced ledgers."""
        give_up = time.monotonic() + within_s
        while True:
            ledgers = self.ledgers()
            held = ("live", "leased", "moving")
            if ledgers and not any(te[state] for te in ledgers.values() for state in held):
                break
            assert time.monotonic() < give_up, f"KV blocks still held: {ledgers}"
            time.sleep(0.05)
        for ledger in ledgers.values():
            states = ("live", "cached", "leased", "moving", "free")
            assert ledger["total"] == sum(ledger[state] for state in states), ledger
            assert not ledger["owners"], ledger
        return ledgers

    async def settled(self, model: str, num: int, within_s: float = 30.0) -> list[dict[str, Any]]:
        """Wait until a model has exactly so many TEs, ready and answering, and none on its way up or down."""
        give_up = time.monotonic() + within_s
        while True:
            _, body = await asyncio.to_thread(self.get, "/debug/status")
            tes = [s for s in body["services"] if s["kind"] == "te" and s.get("model") == model]
            if len(tes) == num and all(te["state"] == "ready" for te in tes):
                return tes
            assert time.monotonic() < give_up, (tes, self.logs())
            await asyncio.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """Every process of this instance."""
        assert self.process is not None
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]


@dataclass
class Stream:
    """What one streaming client saw."""

    texts: dict[int, str] = field(default_factory=dict)  # choice -> text
    finish: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    num_chunks: int = 0
    gaps_s: list[float] = field(default_factory=list)  # between successive content chunks
    error: dict[str, Any] | None = None
    done: bool = False

    @property
    def text(self) -> str:
        """Choice 0's text."""
        return self.texts.get(0, "")


def body(model: str, prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    """A completion request that always runs to `max_tokens`."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    request: dict[str, Any],
    *,
    path: str = "/v1/completions",
    on_chunk: Any = None,
) -> Stream:
    """Send a streaming request and follow it to its end."""
    seen = Stream()
    last = 0.0
    async with session.post(url + path, json=request) as response:
        if response.status != 200:
            seen.error = (await response.json())["error"]
            return seen
        async for line in response.content:
            if line.startswith(b":"):
                seen.comments.append(line[1:].decode().strip())
            if not line.startswith(b"data: "):
                continue
            payload = line[6:].strip()
            if payload == b"[DONE]":
                seen.done = True
                continue
            chunk = json.loads(payload)
            if "error" in chunk:
                seen.error = chunk["error"]
                continue
            seen.usage = chunk.get("usage") or seen.usage
            for choice in chunk["choices"]:
                text = choice.get("text", choice.get("delta", {}).get("content"))
                if text:
                    now = time.monotonic()
                    seen.gaps_s.append(now - last if last else 0.0)
                    last = now
                    seen.num_chunks += 1
                    index = choice["index"]
                    seen.texts[index] = seen.texts.get(index, "") + text
                if choice["finish_reason"] is not None:
                    assert choice["index"] not in seen.finish, "two ends of one choice"
                    seen.finish[choice["index"]] = choice["finish_reason"]
            if on_chunk is not None:
                on_chunk(seen)
    return seen


async def stream_all(
    url: str, requests: list[dict[str, Any]], on_chunk: Any = None
) -> list[Stream]:
    """All requests at once."""
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        return await asyncio.gather(
            *(stream(session, url, request, on_chunk=on_chunk) for request in requests)
        )
