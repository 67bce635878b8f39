"""The rim of the cache service: hears block events and beats, asks for dumps, and answers `rtc.match`.

Each replica holds the whole directory. A new one joins the queue group only when it has asked every holder it heard in
its first moments, so that it does not answer from an empty index while its peers know better. One replica of each host
owns its arena besides (`arena_service.py`); the others try again and again, should that one die. This module must not
know how events become an index (`directory.py`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from services.cache.arena_service import ArenaService
from services.cache.directory import Directory
from services.cache.meters import Meters
from services.cache.settings import CacheSettings
from shared.arena.place import ArenaError, Place
from shared.dumps import Dumps, request_dump
from shared.errors import Unavailable
from shared.liveness import Liveness
from shared.messages import Beat, Down, TeBeat
from shared.rtc_messages import BlockEvents, BlocksDump, Match, Matched
from shared.service import REST_BEAT_S, Service
from shared.subjects import QUEUE_CACHE, is_token

_TICK_S: Final = 0.25
_WARM_S: Final = 3.0  # a TE that does not answer must not keep a replica out for longer
_OWN_S: Final = 1.0  # between attempts to own the arena


class Cache:
    """Wires a Directory to the bus."""

    def __init__(self, service: Service[CacheSettings]) -> None:
        self._service = service
        self._directory = Directory(max_bytes=service.settings.index_bytes)
        self._holders = Liveness()  # TEs, and the cache services that own an arena
        self._arena: ArenaService | None = None  # of this host, if it is ours
        self._arena_fault = ""
        metrics = service.metrics
        self._events = metrics.counter("deepflow_cache_events_total", "Block events heard.")
        self._dumps = Dumps(
            self._directory.feeds,
            ask=self._ask,
            load=self._directory.load,
            alive=self._known,
            tasks=service.tasks,
            log=service.log,
            outcomes=metrics.counter(
                "deepflow_cache_dumps_total", "Whole indexes asked for.", ["outcome"]
            ),
        )
        self._matches = metrics.counter(
            "deepflow_cache_matches_total", "Questions answered.", ["outcome"]
        )
        metrics.collect(Meters(self._directory, lambda: self._arena))

    async def start(self) -> None:
        """Listen, catch up with every TE that beats, then serve."""
        service, bus, subjects = self._service, self._service.bus, self._service.bus.subjects
        bus.on_disconnect(self._holders.hold)
        bus.on_reconnect(self._on_reconnect)
        for events in (subjects.blocks("*", "*"), subjects.arena("*", "*")):
            await bus.listen(events, (BlockEvents,), self._on_events)
        await bus.listen(subjects.beat("te", "*"), (TeBeat,), self._on_te)
        await bus.listen(subjects.beat("cache", "*"), (Beat,), self._on_cache)
        for kind in ("te", "cache"):
            await bus.listen(subjects.down(kind, "*"), (Down,), self._on_down)
        service.status(self._status, ledger=self._ledger)
        if service.settings.arena_bytes is not None:
            tried = asyncio.Event()
            service.tasks.create_task(self._own_loop(tried), name="arena")
            await tried.wait()
        service.beat(self._beat)
        await asyncio.sleep(1.5 * REST_BEAT_S)  # whoever lives has beaten by then
        await self._dumps.warm_up(_WARM_S)
        service.tasks.create_task(self._tick_loop(), name="tick")
        intake = await bus.serve(subjects.rtc("match"), (Match,), self._match, queue=QUEUE_CACHE)
        service.on_drain(intake.drain)
        service.ready()

    # ------------------------------------------------------------------------------------------------------- the arena

    async def _own_loop(self, tried: asyncio.Event) -> None:
        """Owns the arena as soon as nobody else does, until the end. Who loses it ends: its events are numbered on."""
        service = self._service
        while True:
            place = await asyncio.to_thread(self._take_place)
            if place is not None:
                try:
                    async with ArenaService.own(service, self._directory, place) as arena:
                        self._arena = arena
                        service.on_drain(arena.drain)
                        tried.set()
                        await asyncio.Event().wait()
                except* Unavailable as group:
                    service.stop("; ".join(map(str, group.exceptions)))
                self._arena = None
                tried.set()
                return
            tried.set()
            await asyncio.sleep(_OWN_S)

    def _take_place(self) -> Place | None:
        """In a thread. A folder that cannot be used is said once, and tried again: it may be mended."""
        settings, fault = self._service.settings, ""
        try:
            return Place.own(settings.arena_dir)
        except ArenaError as error:
            fault = str(error)
            if fault != self._arena_fault:
                self._service.log.error("arena_refused", error=fault)
            return None
        finally:
            self._arena_fault = fault

    # ---------------------------------------------------------------------------------------------------- listening

    def _on_events(self, events: BlockEvents) -> None:
        self._events.inc()
        # Events of a holder already declared dead would bring its index back for ever: only a beat opens one.
        if events.te != self._service.id and self._holders.alive(events.te):
            self._directory.apply(events)

    def _on_te(self, beat: TeBeat) -> None:
        if beat.state == "loading" or not is_token(beat.id):
            return  # it has nothing yet and answers nobody; or nobody could ask it
        # Progress is not judged: a hung TE still holds its pages, and its pod host declares it dead.
        self._holders.beat(beat.id, time.monotonic())
        self._directory.seen(beat.id, beat.model)
        if self._arena is not None:
            told = beat.counters.get
            self._arena.broker.heard(beat.id, told("peer_bytes", 0.0), told("peer_us", 0.0) / 1e6)

    def _on_cache(self, beat: Beat) -> None:
        if not beat.host or beat.id == self._service.id or not is_token(beat.id):
            return  # it has no pages of its own; or they are ours, and need no telling; or nobody could ask it
        self._holders.beat(beat.id, time.monotonic())
        self._directory.owns(beat.id, beat.host)
        for model in beat.models:
            self._directory.seen(beat.id, model)

    def _on_down(self, down: Down) -> None:
        if down.id != self._service.id:  # by mistake: here we are
            self._holders.down(down.id)
            self._gone(down.id)

    def _on_reconnect(self) -> None:
        self._holders.resume(time.monotonic())
        self._directory.feeds.doubt()

    def _gone(self, holder: str) -> None:
        """A holder is dead: what it had is not to be had any more, and what it was lent comes back."""
        self._dumps.gone(holder)
        if self._directory.remove(holder):
            self._service.log.info("index_removed", te=holder)
        if self._arena is not None:
            self._arena.gone(holder)

    async def _match(self, match: Match) -> Matched:
        holders = self._directory.match(match.model, match.hashes)
        self._matches.labels("hit" if holders else "miss").inc()
        return Matched(holders=holders)

    # -------------------------------------------------------------------------------------------------- catching up

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            for holder in self._holders.lost(time.monotonic()):
                self._gone(holder)
            self._dumps.catch_up()

    async def _ask(self, holder: str, model: str) -> BlocksDump:
        service = self._service
        if holder == service.id and self._arena is not None:
            return await self._arena.host.dump(model)
        return await request_dump(
            service.bus, holder, model, by=service.id, timeout_s=service.settings.dump_timeout_s
        )

    def _known(self, holder: str) -> bool:
        return holder == self._service.id or self._holders.alive(holder)

    # --------------------------------------------------------------------------------------------------- what is told

    def _beat(self) -> Beat:
        arena = self._arena
        return Beat(
            kind="cache",
            id=self._service.id,
            draining=self._service.stopping.is_set(),
            in_flight=0 if arena is None else arena.broker.num_moving,
            host="" if arena is None else arena.host.name,
            models=[] if arena is None else arena.host.models,
        )

    def _status(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "pages": self._directory.num_pages,
            "bytes": self._directory.num_bytes,
            "gaps": self._directory.feeds.num_gaps,
            "refused": self._directory.num_refused,
            "tes": self._directory.holders(),
            "unsynced": sorted({holder for holder, _ in self._directory.feeds.unsynced()}),
            "arena": None if self._arena is None else self._arena.status(now),
            "arena_fault": self._arena_fault,
        }

    def _ledger(self) -> dict[str, Any]:
        self._directory.check()
        return {
            "pages": self._directory.num_pages,
            "max_pages": self._directory.max_pages,
            **({} if self._arena is None else self._arena.ledger()),
        }


async def main(service: Service[CacheSettings]) -> None:
    """Sets the replica up."""
    await Cache(service).start()
