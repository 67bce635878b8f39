"""What the owner of a host's arena serves: slots, tickets, leases, dumps; and the life of that ownership.

One cache service of a host owns its arena (`shared/arena/place.py`); another one waits for its turn and is a replica
of the directory meanwhile. Ownership is one scope: what it started ends with it, then the files are closed. Nothing in
here decides anything: `arena.py` does about slots, `populate.py` about sources, `leases.py` about who may read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final

from services.cache.directory import Directory
from services.cache.exchange import Exchange
from services.cache.host import Host
from services.cache.leases import Asked, Leases
from services.cache.populate import Broker
from services.cache.settings import CacheSettings
from shared.arena.place import Place
from shared.borrower import Borrower
from shared.bus import Subscription
from shared.distflow.backend import chosen
from shared.distflow.flow import DistFlow
from shared.errors import DeepFlowError, Unavailable
from shared.rtc_messages import (
    BlockEvents,
    BlocksDump,
    BlocksQuery,
    Commit,
    Copy,
    Free,
    LeaseRelease,
    LeaseRequest,
    LinkRequest,
    Populate,
    QueryPopulate,
)
from shared.service import Service

_POLL_S: Final = 1.0
_SPILL_S: Final = 0.02  # between looks at what will be evicted soon
_MAX_EVENTS: Final = (
    1024  # that wait to be published; what is lost beyond that shows as a gap, and is asked for
)
_NUM_DECISIONS: Final = 16  # that `status` shows


class ArenaService:
    """The arena of this host while this service owns it. Made by `own`."""

    def __init__(self, service: Service[CacheSettings], directory: Directory, place: Place) -> None:
        settings = service.settings
        self._service = service
        self._bus = service.bus
        self._directory = directory
        self._events: asyncio.Queue[BlockEvents] = asyncio.Queue(_MAX_EVENTS)
        self._intake: list[Subscription] = []
        self._tasks = asyncio.TaskGroup()
        self._leaving = False
        self._flow = DistFlow(
            name=service.id,
            fabric=settings.fabric,
            host=place.host,
            backends=chosen(settings.distflow, settings.fabric),
        )
        self.host = Host(settings, place, service.id, self._announce)
        self.leases = Leases(self.host, self._flow, max_bytes=settings.lease_bytes)
        self.exchange = Exchange(Borrower(service.bus, self._flow, service.id))
        self.broker = Broker(
            name=service.id,
            host=self.host,
            remote=self.exchange,
            directory=directory,
            tasks=self._tasks,
            max_bytes=settings.fetch_bytes,
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def own(
        cls, service: Service[CacheSettings], directory: Directory, place: Place
    ) -> AsyncIterator[ArenaService]:
        """The arena, served for as long as the block lasts. Raises Unavailable for a fabric that is not ours."""
        arena = cls(service, directory, place)
        try:
            async with arena._tasks as tasks:
                await arena._open()
                tasks.create_task(arena._publish_loop(), name="arena-events")
                tasks.create_task(arena._poll_loop(), name="arena-poll")
                if arena.host.has_ssd:
                    tasks.create_task(arena._spill_loop(), name="arena-spill")
                yield arena
        finally:
            await asyncio.to_thread(arena._flow.close)
            await arena.host.close()

    async def _open(self) -> None:
        settings, subjects, name = self._service.settings, self._bus.subjects, self.host.name
        try:
            self._flow.start()
        except (OSError, ValueError) as error:
            raise Unavailable(f"DEEPFLOW_FABRIC={settings.fabric}: {error}") from error
        self._directory.owns(self._service.id, name)
        await self.host.open()
        log = self._service.log
        if self.host.ssd_fault:
            log.warning("ssd_refused", error=self.host.ssd_fault)
        log.info("arena_opened", host=name, bytes=self.host.max_bytes, pages=self.num_pages)
        serve, listen = self._bus.serve, self._bus.listen
        lent: tuple[type[Asked], ...] = (LinkRequest, LeaseRequest, LeaseRelease)
        self._intake += [
            await serve(subjects.rtc("copy", name), (Copy,), self.host.copy),
            await serve(subjects.rtc("populate", name), (Populate,), self.broker.populate),
            await serve(subjects.rtc("query", name), (QueryPopulate,), self.broker.query),
            await serve(subjects.link(self._service.id), lent, self.leases.answer),
            await serve(subjects.blocks_dump(self._service.id), (BlocksQuery,), self._dump),
            await listen(subjects.rtc("commit", name), (Commit,), self._on_commit),
            await listen(subjects.rtc("free"), (Free,), self._on_free),
        ]

    async def drain(self) -> None:
        """Take no new work; what is under way is answered."""
        self._leaving = True
        await asyncio.gather(*(subscription.drain() for subscription in self._intake))

    # --------------------------------------------------------------------------------------------------- the bus side

    def _on_commit(self, commit: Commit) -> None:
        self._tasks.create_task(self.host.commit(commit), name="commit")

    def _on_free(self, free: Free) -> None:
        self._tasks.create_task(self.host.free(free.keep), name="free")

    async def _dump(self, query: BlocksQuery) -> BlocksDump:
        return await self.host.dump(query.model)

    def _announce(self, events: list[BlockEvents]) -> None:
        """Our own directory hears it first."""
        for event in events:
            self._directory.apply(event)
            if not self._events.full():
                self._events.put_nowait(event)

    async def _publish_loop(self) -> None:
        while True:
            event = await self._events.get()
            # The bus is away: the gap tells the others, once it is back.
            with contextlib.suppress(DeepFlowError):
                await self._bus.publish(self._bus.subjects.arena(event.model, event.te), event)

    # --------------------------------------------------------------------------------------------------------- upkeep

    async def _poll_loop(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            await self.leases.sweep()
            await self.host.poll()
            self.broker.sweep()

    async def _spill_loop(self) -> None:
        """What was given out for writing may have brought pages next to their eviction: see, and copy them in time."""
        while True:
            await self.host.given.wait()
            self.host.given.clear()
            while await self.host.spill():
                pass
            await asyncio.sleep(_SPILL_S)

    def gone(self, holder: str) -> None:
        """A TE or another cache service is dead."""
        if not self._leaving:
            self._tasks.create_task(self._gone(holder), name=f"gone-{holder}")

    async def _gone(self, holder: str) -> None:
        await self.leases.down(holder)
        await self.host.down(holder)
        await self.broker.gone(holder)

    # --------------------------------------------------------------------------------------------------- what is told

    @property
    def num_pages(self) -> int:
        """Pages in the arena."""
        kinds = self.host.accounts.get("arena", {}).values()
        return sum(kind["cached"] + kind["kept"] + kind["leased"] for kind in kinds)

    def status(self, now: float) -> dict[str, Any]:
        """For people."""
        broker = self.broker
        return {
            "host": self.host.name,
            "bytes": self.host.max_bytes,
            "pages": self.num_pages,
            "models": self.host.models,
            "links": self.exchange.num_links,
            "outcomes": dict(broker.outcomes),
            "speeds": broker.speeds.table(now),
            "decisions": broker.decisions.latest(_NUM_DECISIONS, now),
        }

    def ledger(self) -> dict[str, Any]:
        """Every slot and byte, and who has it."""
        return {
            **self.host.accounts,
            "leases": self.leases.num_leases,
            "leased_bytes": self.leases.num_bytes,
            "tickets": self.broker.num_tickets,
            "moving_pages": self.broker.num_moving,
            "moving_bytes": self.broker.num_bytes,
        }
