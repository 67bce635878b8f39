"""Tenants of a gateway with keys, and what they make context caches of."""

from __future__ import annotations

from typing import Any

import aiohttp

from tests.gateway.peers import MODEL
from tests.gateway.running import RunningGateway

KEYS = "alice:key-alice,bob:key-bob,operator:key-operator"
SYSTEM: list[Any] = [{"role": "system", "content": "You know this by heart. " * 4}]
QUESTION: list[Any] = [{"role": "user", "content": "What?"}]
MADE = {"model": MODEL, "messages": SYSTEM, "ttl": 600}


class Caller:
    """One tenant's HTTP at one gateway."""

    def __init__(self, http: aiohttp.ClientSession, gateway: RunningGateway, tenant: str) -> None:
        self._http = http
        self._url = gateway.url
        self.headers = {"Authorization": f"Bearer key-{tenant}"}

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Status and body of an answer."""
        given = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._http.request(
            method, self._url + path, json=body, headers=given
        ) as response:
            return response.status, await response.json()

    async def make(self, **more: Any) -> dict[str, Any]:
        """A cache, which must succeed."""
        status, made = await self.call("POST", "/v1/caches", MADE | more)
        assert status == 200, made
        assert isinstance(made, dict)
        return made

    async def chat(self, messages: list[Any] = QUESTION, **more: Any) -> Any:
        """Status and body of a chat."""
        body = {"model": MODEL, "messages": messages, "max_tokens": 4, **more}
        return await self.call("POST", "/v1/chat/completions", body)
