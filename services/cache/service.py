"""The rim of the cache service: hears block events and beats, asks for dumps, and answers `rtc.match`.

Each replica holds the whole directory. A new one joins the queue group only when it has asked every TE it heard in its
first moments, so that it does not answer from an empty index while its peers know better. This module must not know how
events become an index (`directory.py`).
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any, Final

from services.cache.directory import Directory
from services.cache.settings import CacheSettings
from shared.errors import DeepFlowError
from shared.liveness import Liveness
from shared.messages import (
    Beat,
    BlockEvents,
    BlocksDump,
    BlocksQuery,
    Down,
    Match,
    Matched,
    TeBeat,
)
from shared.service import REST_BEAT_S, Service
from shared.subjects import QUEUE_CACHE

_TICK_S: Final = 0.25
_WARM_S: Final = 3.0  # a TE that does not answer must not keep a replica out for longer
_RETRY_S: Final = 1.0  # before the same TE is asked again
_NUM_ASKED: Final = 4  # at once: dumps are megabytes


class Cache:
    """Wires a Directory to the bus."""

    def __init__(self, service: Service[CacheSettings]) -> None:
        self._service = service
        self._directory = Directory(max_bytes=service.settings.index_bytes)
        self._tes = Liveness()
        self._asking = asyncio.Semaphore(_NUM_ASKED)
        self._ask_after: dict[str, float] = {}  # TE -> when it may be asked again
        metrics = service.metrics
        self._events = metrics.counter("deepflow_cache_events_total", "Block events heard.")
        self._dumps = metrics.counter(
            "deepflow_cache_dumps_total", "Whole indexes asked for.", ["outcome"]
        )
        self._matches = metrics.counter(
            "deepflow_cache_matches_total", "Questions answered.", ["outcome"]
        )
        directory = self._directory
        for name, text, value in (
            ("entries", "Pages in all indexes.", lambda: directory.num_pages),
            ("bytes", "What they cost.", lambda: directory.num_bytes),
            ("tes", "TEs with an index.", lambda: len(directory.tes())),
            ("unsynced", "TEs whose index is to be asked for.", lambda: len(directory.unsynced())),
            ("gaps", "Gaps in the numbers of events so far.", lambda: directory.num_gaps),
            ("refused", "Pages the budget left out so far.", lambda: directory.num_refused),
        ):
            metrics.gauge(f"deepflow_cache_{name}", text).set_function(value)

    async def start(self) -> None:
        """Listen, catch up with every TE that beats, then serve."""
        service, bus, subjects = self._service, self._service.bus, self._service.bus.subjects
        bus.on_disconnect(self._tes.hold)
        bus.on_reconnect(self._on_reconnect)
        await bus.listen(subjects.blocks("*", "*"), (BlockEvents,), self._on_events)
        await bus.listen(subjects.beat("te", "*"), (TeBeat,), self._on_beat)
        await bus.listen(subjects.down("te", "*"), (Down,), self._on_down)
        service.status(self._status, ledger=self._ledger)
        service.beat(self._beat)
        await self._warm_up()
        service.tasks.create_task(self._tick_loop(), name="tick")
        intake = await bus.serve(subjects.rtc("match"), (Match,), self._match, queue=QUEUE_CACHE)
        service.on_drain(intake.drain)
        service.ready()

    async def _warm_up(self) -> None:
        await asyncio.sleep(1.5 * REST_BEAT_S)  # whoever lives has beaten by then
        try:
            async with asyncio.timeout(_WARM_S):
                await asyncio.gather(*(self._ask(te) for te in self._directory.unsynced()))
        except TimeoutError:
            self._service.log.warning("warm_up_cut_short", unsynced=self._directory.unsynced())

    # ---------------------------------------------------------------------------------------------------- listening

    def _on_events(self, events: BlockEvents) -> None:
        self._events.inc()
        # Events of a TE already declared dead would bring its index back for ever: only a beat opens one.
        if self._tes.alive(events.te):
            self._directory.apply(events)

    def _on_beat(self, beat: TeBeat) -> None:
        if beat.state == "loading":
            return  # it has nothing yet and answers nobody
        # Progress is not judged: a hung TE still holds its pages, and its pod host declares it dead.
        self._tes.beat(beat.id, time.monotonic())
        self._directory.seen(beat.id, beat.model)

    def _on_down(self, down: Down) -> None:
        self._tes.down(down.id)
        self._remove(down.id)

    def _on_reconnect(self) -> None:
        self._tes.resume(time.monotonic())
        self._directory.doubt()

    def _remove(self, te: str) -> None:
        self._ask_after.pop(te, None)
        if self._directory.remove(te):
            self._service.log.info("index_removed", te=te)

    async def _match(self, match: Match) -> Matched:
        holders = self._directory.match(match.model, match.hashes)
        self._matches.labels("hit" if holders else "miss").inc()
        return Matched(holders=holders)

    # -------------------------------------------------------------------------------------------------- catching up

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            for te in self._tes.lost(time.monotonic()):
                self._remove(te)
            self._catch_up()

    def _catch_up(self) -> None:
        """Asks every TE that is unsynced, unless it was asked a moment ago."""
        now = time.monotonic()
        for te in self._directory.unsynced():
            if self._ask_after.get(te, 0.0) <= now:
                self._ask_after[te] = math.inf  # until this one has been answered
                self._service.tasks.create_task(self._ask(te), name=f"ask-{te}")

    async def _ask(self, te: str) -> None:
        """One TE's whole index; events that come meanwhile wait in the directory."""
        bus, settings = self._service.bus, self._service.settings
        try:
            async with self._asking:
                dump = await bus.request(
                    bus.subjects.blocks_dump(te),
                    BlocksQuery(by=self._service.id),
                    BlocksDump,
                    timeout_s=settings.dump_timeout_s,
                )
        except DeepFlowError as error:
            self._dumps.labels(error.code).inc()
            self._service.log.warning("dump_failed", te=te, error=error.message)
        else:
            if self._tes.alive(te):
                self._dumps.labels("loaded").inc()
                self._directory.load(dump)
                self._service.log.info("dump_loaded", te=te, pages=len(dump.hashes), seq=dump.seq)
        if self._tes.alive(te):
            self._ask_after[te] = time.monotonic() + _RETRY_S

    # --------------------------------------------------------------------------------------------------- what is told

    def _beat(self) -> Beat:
        return Beat(kind="cache", id=self._service.id, draining=self._service.stopping.is_set())

    def _status(self) -> dict[str, Any]:
        return {
            "pages": self._directory.num_pages,
            "bytes": self._directory.num_bytes,
            "gaps": self._directory.num_gaps,
            "refused": self._directory.num_refused,
            "tes": self._directory.tes(),
            "unsynced": self._directory.unsynced(),
        }

    def _ledger(self) -> dict[str, Any]:
        self._directory.check()
        return {"pages": self._directory.num_pages, "max_pages": self._directory.max_pages}


async def main(service: Service[CacheSettings]) -> None:
    """Sets the replica up."""
    await Cache(service).start()
