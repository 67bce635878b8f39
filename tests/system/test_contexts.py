"""Explicit context caches over the whole platform: made once, continued from, kept through the death of their TE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deepflow.bench.conversation.hosts import Cluster
from tests.worker.tiny import make_tiny

pytestmark = [pytest.mark.system, pytest.mark.apart, pytest.mark.timeout(180)]
MODEL = "tiny"
KEYS = {"DEEPFLOW_API_KEYS": "alice:key-a,bob:key-b,operator:key-o"}
CONTEXT = [{"role": "system", "content": "You know this by heart. " * 40}]
QUESTION = [{"role": "user", "content": "What do you know?"}]


class Caller:
    """One tenant's HTTP."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self._session = session
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        async with self._session.request(
            method, self._url + path, json=body, headers=self._headers
        ) as answer:
            return answer.status, await answer.json()

    async def chat(self, messages: list[dict[str, str]], **more: Any) -> tuple[int, Any]:
        """A short greedy chat."""
        body = {
            "model": MODEL,
            "messages": messages,
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            **more,
        }
        return await self.call("POST", "/v1/chat/completions", body)


async def test_a_context_is_computed_once_and_outlives_its_te(tmp_path: Path) -> None:
    """A chat that names a context answers as if its messages had been sent whole, hits the cache, also after the TE
    that computed it was killed; another tenant, and everybody after its end, gets 404."""
    make_tiny(tmp_path / "models" / MODEL, layers=2, name=MODEL)
    settings = KEYS | {
        "DEEPFLOW_ARENA_BYTES": str(128 << 20),
        "DEEPFLOW_THREADS": "1",
        "DEEPFLOW_FETCH_MIN_MS": "0",  # so small a model computes faster than that
    }
    async with (
        Cluster.start(MODEL, tmp_path, settings, num_workers=2) as cluster,
        aiohttp.ClientSession() as session,
    ):
        alice, bob = (Caller(session, cluster.url, key) for key in ("key-a", "key-b"))
        status, whole = await bob.chat([*CONTEXT, *QUESTION])
        assert status == 200, cluster.logs()
        status, context = await alice.call(
            "POST", "/v1/caches", {"model": MODEL, "messages": CONTEXT, "ttl": 600}
        )
        assert status == 200, (context, cluster.logs())
        num_pages = context["tokens"] // 16

        await cluster.wait_copied(num_pages)
        for killed in (False, True):
            if killed:
                await cluster.kill_server()
            status, answer = await alice.chat(QUESTION, cache=context["id"])
            assert status == 200, cluster.logs()
            assert answer["choices"][0]["message"] == whole["choices"][0]["message"]
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= num_pages * 16, (killed, cached, cluster.logs())

        status, refusal = await bob.chat(QUESTION, cache=context["id"])
        assert status == 404
        assert (await bob.call("GET", f"/v1/caches/{context['id']}"))[0] == 404
        assert (await alice.call("DELETE", f"/v1/caches/{context['id']}"))[0] == 200
        assert await alice.chat(QUESTION, cache=context["id"]) == (404, refusal)
