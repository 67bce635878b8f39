"""A minimal service for the tests of shared.service: it serves one subject slowly and says what happened."""

from __future__ import annotations

import asyncio
import os
import sys

from shared.config import Settings
from shared.messages import Accepted, Cancel
from shared.service import Service, main


async def open_probe(service: Service[Settings]) -> None:
    """Serve `probe`, beat, and drain in order."""
    if os.environ.get("PROBE") == "fail":
        raise ZeroDivisionError

    async def slow(cancel: Cancel) -> Accepted:
        if cancel.request == "crash":
            service.tasks.create_task(crash())
        await asyncio.sleep(0.5)
        return Accepted(request=cancel.request, attempt=cancel.attempt, by=service.id)

    async def crash() -> None:
        raise ZeroDivisionError

    served = await service.bus.serve("probe", (Cancel,), slow)
    service.status(lambda: {"answer": 42}, ledger=lambda: {"live": 0})
    service.on_drain(served.drain)
    service.beat()
    service.ready()


if __name__ == "__main__":
    sys.exit(main("probe", Settings.load, open_probe))
