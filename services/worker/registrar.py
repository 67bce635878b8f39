"""Keeps a service's entries in the bus's tables: written again whenever the bus comes back, for a server may have lost
its store. Must not know what the entries mean.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from shared.errors import DeepFlowError
from shared.table import heed_cancellation

if TYPE_CHECKING:
    from shared.bus import Bus
    from shared.log import Logger

_RETRY_S: Final = 1.0


class Registrar:
    """The entries that this process answers for. `keep` is to be run as a task."""

    def __init__(self, bus: Bus, log: Logger) -> None:
        self._bus = bus
        self._log = log
        self._entries: dict[tuple[str, str], object] = {}  # (table, key) -> message
        self._due = asyncio.Event()
        bus.on_reconnect(self._due.set)

    def put(self, table: str, key: str, message: object) -> None:
        """Have `message` under `key` in `table`, soon and from now on."""
        self._entries[(table, key)] = message
        self._due.set()

    async def remove(self, table: str, key: str) -> None:
        """Take an entry out, ours or not. If the bus is away it stays behind, and beats tell that it is stale."""
        self._entries.pop((table, key), None)
        try:
            await (await self._bus.table(table)).delete(key)
        except DeepFlowError as error:
            self._log.warning("entry_left_behind", table=table, key=key, error=error.message)

    async def keep(self) -> None:
        """Write what is due, for ever."""
        while True:
            heed_cancellation()
            await self._due.wait()
            self._due.clear()
            try:
                for table, key in list(self._entries):
                    bucket = await self._bus.table(table)
                    if message := self._entries.get((table, key)):  # not removed meanwhile
                        await bucket.put(key, message)
            except DeepFlowError as error:
                self._log.warning("registration_failed", error=error.message)
                await asyncio.sleep(_RETRY_S)
                self._due.set()
