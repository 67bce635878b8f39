"""A whole gateway inside a test's event loop: the real service, on a free port."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from services.gateway.app import main
from services.gateway.settings import GatewaySettings
from shared import service as service_module
from shared.service import Service


class RunningGateway:
    """Start and stop one gateway; `url` is its address."""

    def __init__(self, nats_url: str, cache: Path, **overrides: Any) -> None:
        settings = GatewaySettings.load(
            {
                "DEEPFLOW_NATS_URL": nats_url,
                "DEEPFLOW_CACHE": str(cache),
                "DEEPFLOW_HOME": str(cache / "home"),
                "DEEPFLOW_PORT": "0",
                "DEEPFLOW_TOKENIZERS": "1",
                "DEEPFLOW_GRACE_S": "5",
                "DEEPFLOW_LOG_LEVEL": "error",
                "DEEPFLOW_API_KEYS": overrides.pop("api_keys", ""),
            }
        )
        self.settings = dataclasses.replace(settings, **overrides)
        self.url = ""
        self.service: Service[GatewaySettings] | None = None
        self._task: asyncio.Task[int] | None = None

    async def start(self) -> None:
        """Run until it listens."""
        listening: asyncio.Future[Service[GatewaySettings]] = asyncio.Future()

        async def start(service: Service[GatewaySettings]) -> None:
            await main(service)
            listening.set_result(service)

        self._task = asyncio.create_task(
            service_module._run("gateway", self.settings, start, metrics=True)
        )
        done, _ = await asyncio.wait(
            [self._task, listening], timeout=20, return_when=asyncio.FIRST_COMPLETED
        )
        assert listening in done, "the gateway did not start"
        self.service = listening.result()
        self.url = self.service._make_status()["url"]

    async def stop(self) -> int:
        """Drain, and the exit code."""
        assert self.service is not None
        assert self._task is not None
        self.service.stop()
        return await self._task
