"""Where a TE that lacks pages can read them: finds the cheapest sources, fetches what is far, and answers with slots.

A `Populate` is planned (`cost.py`) over all that is known to have its pages: the arena, the SSD behind it, the arenas
of other hosts, the devices of other TEs, and what is on its way already: nothing is fetched twice at once. Pages from
SSD and from other hosts come into the arena in the background; the asker holds a ticket meanwhile. A fetch that fails
or takes too long ends: what is there by then is the answer, and the rest is computed. This module must not know how
bytes move.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from services.cache.cost import Plan, Source, Speed, Speeds, plan
from services.cache.decisions import Decision, Decisions
from services.cache.directory import TIERS, Directory
from services.cache.exchange import Batch
from services.cache.host import MAX_PAGES, Page, kind_of
from shared.arena.segment import PageKind
from shared.errors import DeepFlowError, InvalidRequest, NotFound, Overloaded
from shared.log import get
from shared.rtc_messages import Populate, Populated, QueryPopulate, Slot

# Before anything was measured. Rather too good than too bad: what is never tried is never measured.
PRIORS: Final = {
    "ssd": Speed(start_s=0.001, bytes_per_s=500e6),
    # Another host's arena.
    "remote": Speed(start_s=0.005, bytes_per_s=500e6),
    # Another TE's device, read by the asker itself; its engine answers between two steps.
    "peer": Speed(start_s=0.03, bytes_per_s=500e6),
}
# Reading from a TE takes of its time, and it may be gone when it is asked, with nobody to fall back on: an arena is
# preferred unless it takes so many times longer.
PEER_PREMIUM: Final = 2.0
MAX_TICKETS: Final = 1024
TICKET_S: Final = 15.0  # longer than any fetch
MAX_WAIT_S: Final = 30.0
NUM_CANDIDATES: Final = 4  # of other hosts, and of other TEs, that are looked at
BATCH_BYTES: Final = 16 << 20  # fetched at a time: what is there can be read while the rest comes
NO_ROOM_S: Final = 1.0  # without fetches after one for which the arena had no room
# How long a fetch may take: so many times what was predicted, and something for the start.
_SLACK: Final = 4.0
_SLACK_S: Final = 3.0
_MAX_FETCH_S: Final = 10.0

_NOTHING: Final = Batch([], start_s=0.0)
_DEVICE, _HOST, _SSD = (TIERS.index(tier) for tier in ("device", "host", "ssd"))


class Tiers(Protocol):
    """What is needed of this host's own tiers (`host.Host`)."""

    name: str

    async def find(self, kind: PageKind, hashes: Sequence[bytes]) -> list[Slot]:
        """The slots of the longest prefix that is in the arena."""

    async def write(self, kind: PageKind, pages: Sequence[Page]) -> list[bytes]:
        """Puts pages into the arena; the leading ones that are there then."""

    async def read_ssd(self, kind: PageKind, hashes: Sequence[bytes]) -> list[Page]:
        """The leading ones of these pages that the SSD has."""


class Remote(Protocol):
    """What is needed of the other hosts (`exchange.Exchange`)."""

    async def read(
        self, cache: str, kind: PageKind, hashes: list[bytes], timeout_s: float
    ) -> Batch:
        """The leading ones of these pages that another host's arena has."""

    async def forget(self, cache: str) -> None:
        """It failed, or is gone."""


@dataclass(slots=True, eq=False)
class _Fetch:
    """One run of pages on its way into the arena."""

    source: str
    kind: PageKind
    hashes: list[bytes]
    page_us: float
    limit: asyncio.Timeout
    over: asyncio.Future[None]
    tickets: list[_Ticket] = field(default_factory=list)
    num_landed: int = 0
    fault: str = ""


@dataclass(slots=True, eq=False)
class _Ticket:
    id: str
    kind: PageKind
    hashes: list[bytes]  # those that the arena is to have in the end
    fetches: list[_Fetch]
    peer: str
    peer_pages: int
    decision: Decision
    began: float


class Broker:
    """Answers `Populate` and `QueryPopulate` for one host. Fetches, of at most `max_bytes` at once, run in `tasks`."""

    def __init__(
        self,
        *,
        name: str,
        host: Tiers,
        remote: Remote,
        directory: Directory,
        tasks: asyncio.TaskGroup,
        max_bytes: int,
    ) -> None:
        self._name = name
        self._host = host
        self._remote = remote
        self._directory = directory
        self._tasks = tasks
        self._max_bytes = max_bytes
        self._moving: dict[bytes, _Fetch] = {}  # page -> what brings it
        self._tickets: OrderedDict[str, _Ticket] = OrderedDict()
        self._room_again = 0.0  # when to try again: the arena had no room for what was brought
        self._peer_reads: dict[str, tuple[float, float]] = {}  # TE -> bytes and seconds, so far
        self.speeds = Speeds(PRIORS)
        self.decisions = Decisions()
        self.num_bytes = 0  # on their way
        self.num_joined = 0  # pages asked for that were on their way already
        self.outcomes: Counter[str] = Counter()  # of decisions
        self.pages: Counter[str] = Counter()  # fetched, by kind of source
        self.faults: Counter[str] = Counter()  # fetches that ended early, likewise

    @property
    def num_tickets(self) -> int:
        """Tickets that somebody may still ask for."""
        return len(self._tickets)

    @property
    def num_moving(self) -> int:
        """Pages on their way."""
        return len(self._moving)

    # ------------------------------------------------------------------------------------------------------- answers

    async def populate(self, ask: Populate) -> Populated:
        """Serves `rtc.populate.<host>`. Raises InvalidRequest."""
        kind = kind_of(ask)
        if ask.page_us < 0 or ask.load_us < 0:
            raise InvalidRequest("nothing takes less than no time", param="page_us")
        hashes = ask.hashes[:MAX_PAGES]
        slots = await self._host.find(kind, hashes)
        # No wait from here to the ticket: two who ask at once shall see each other's fetches.
        now = time.monotonic()
        sources = self._sources(ask, hashes, len(slots), now)
        made = plan(len(hashes), ask.page_us, sources)
        decision = self.decisions.add(ask.te, ask.model, len(hashes), sources, made, now)
        ticket = self._begin(ask, kind, hashes, sources, made, decision, now)
        if not ticket.fetches:
            outcome = "peer" if ticket.peer else "local" if ticket.hashes else "nothing"
            self._decided(decision, outcome, now)
            return Populated(
                slots=slots[: len(ticket.hashes)],
                peer=ticket.peer,
                peer_pages=ticket.peer_pages,
                why=decision.why,
            )
        return await self._answer(ticket, ask.wait_ms)

    async def query(self, ask: QueryPopulate) -> Populated:
        """Serves `rtc.query.<host>`. Raises NotFound for a ticket that is over or unknown."""
        ticket = self._tickets.get(ask.ticket)
        if ticket is None:
            raise NotFound("no such ticket, or not any more", param="ticket")
        return await self._answer(ticket, ask.wait_ms)

    async def _answer(self, ticket: _Ticket, wait_ms: int) -> Populated:
        under_way = [fetch.over for fetch in ticket.fetches if not fetch.over.done()]
        if under_way and wait_ms > 0:
            await asyncio.wait(under_way, timeout=min(wait_ms / 1000, MAX_WAIT_S))
        # In this order: once all is over, what is found is all there will be.
        over = all(fetch.over.done() for fetch in ticket.fetches)
        slots = await self._host.find(ticket.kind, ticket.hashes)
        if over:
            self._tickets.pop(ticket.id, None)
        return Populated(
            slots=slots,
            ticket="" if over else ticket.id,
            peer=ticket.peer,
            peer_pages=ticket.peer_pages,
            why=ticket.decision.why,
        )

    # ------------------------------------------------------------------------------------------------------ planning

    def _sources(
        self, ask: Populate, hashes: list[bytes], num_slots: int, now: float
    ) -> list[Source]:
        """Everything that has some of the pages, and what it costs the asker until they are on its device."""
        own = self._directory.tiers(self._name, ask.model, hashes)
        here = [i < num_slots or tier == _HOST for i, tier in enumerate(own)]
        sources = [Source("arena", here, 0.0, ask.load_us)]
        coming = [
            None if there else self._moving.get(page)
            for there, page in zip(here, hashes, strict=True)
        ]
        if any(coming):
            page_us = max(fetch.page_us for fetch in coming if fetch is not None)
            has = [fetch is not None for fetch in coming]
            sources.append(Source("moving", has, 0.0, page_us + ask.load_us))
        lacking = [not a and b is None for a, b in zip(here, coming, strict=True)]
        if True not in lacking:
            return sources
        others, peers = self._candidates(ask, hashes[lacking.index(True) :])
        if self.num_bytes + ask.slot_bytes <= self._max_bytes and self._room_again <= now:
            has = [lack and tier == _SSD for lack, tier in zip(lacking, own, strict=True)]
            sources.append(self._source("ssd", has, ask, now))
            for name in others:
                tiers = self._directory.tiers(name, ask.model, hashes)
                has = [lack and tier == _HOST for lack, tier in zip(lacking, tiers, strict=True)]
                sources.append(self._source(f"remote:{name}", has, ask, now))
        for name in peers:
            has = [tier == _DEVICE for tier in self._directory.tiers(name, ask.model, hashes)]
            sources.append(self._source(f"peer:{name}", has, ask, now, last=True))
        return [source for source in sources if self.speeds.usable(source.name, now)]

    def _source(
        self, name: str, has: list[bool], ask: Populate, now: float, *, last: bool = False
    ) -> Source:
        # The askers read from peers themselves, and tell what all of it took.
        speed = self.speeds.of("peer" if last else name, now)
        premium = PEER_PREMIUM if last else 1.0
        page_us = premium * speed.us(ask.slot_bytes) + ask.load_us
        return Source(name, has, premium * speed.start_s * 1e6, page_us, last)

    def _candidates(self, ask: Populate, hashes: list[bytes]) -> tuple[list[str], list[str]]:
        """The arenas of other hosts, and the devices of other TEs, that have most of these pages."""
        others, peers = [], []
        for holder in self._directory.match(ask.model, hashes):
            if holder.host:
                if holder.host != self._host.name:
                    others.append(holder.te)
            elif holder.te not in (ask.te, self._name, *ask.avoid):
                peers.append(holder.te)
        return others[:NUM_CANDIDATES], peers[:NUM_CANDIDATES]

    def _begin(
        self,
        ask: Populate,
        kind: PageKind,
        hashes: list[bytes],
        sources: list[Source],
        made: Plan,
        decision: Decision,
        now: float,
    ) -> _Ticket:
        """Starts what the plan says, as far as there is room for it; without any fetch the ticket is not kept."""
        ticket = _Ticket(secrets.token_hex(8), kind, [], [], "", 0, decision, now)
        room = (self._max_bytes - self.num_bytes) // kind.slot_bytes
        cost = {source.name: source for source in sources}
        for run in made.runs:
            pages = hashes[run.start : run.stop]
            if cost[run.source].last:
                ticket.peer, ticket.peer_pages = run.source.partition(":")[2], run.stop
                break
            if run.source == "moving":
                self.num_joined += len(pages)
                ticket.fetches += dict.fromkeys(self._moving[page] for page in pages)
            elif run.source != "arena":
                pages = pages[:room]
                room -= len(pages)
                if pages:
                    ticket.fetches.append(self._fetch(cost[run.source], kind, pages, now))
            ticket.hashes += pages
            if len(ticket.hashes) < run.stop:
                break  # no room for more on the way: what comes behind it is of no use
        ticket.fetches = list(dict.fromkeys(ticket.fetches))
        if ticket.fetches:
            for fetch in ticket.fetches:
                fetch.tickets.append(ticket)
            self._tickets[ticket.id] = ticket
            while len(self._tickets) > MAX_TICKETS:
                self._tickets.popitem(last=False)
        return ticket

    # ------------------------------------------------------------------------------------------------------ fetching

    def _fetch(self, source: Source, kind: PageKind, hashes: list[bytes], now: float) -> _Fetch:
        predicted_s = (source.start_us + len(hashes) * source.page_us) / 1e6
        limit_s = min(_SLACK * predicted_s + _SLACK_S, _MAX_FETCH_S)
        loop = asyncio.get_running_loop()
        fetch = _Fetch(
            source=source.name,
            kind=kind,
            hashes=hashes,
            page_us=source.page_us,
            limit=asyncio.timeout_at(loop.time() + limit_s),
            over=loop.create_future(),
        )
        self._moving.update(dict.fromkeys(hashes, fetch))
        self.num_bytes += len(hashes) * kind.slot_bytes
        self.speeds.queued(fetch.source, len(hashes) * kind.slot_bytes, now)
        self._tasks.create_task(self._run(fetch), name=f"fetch-{fetch.source}")
        return fetch

    async def _run(self, fetch: _Fetch) -> None:
        blamed = False
        try:
            async with fetch.limit:
                await self._bring(fetch)
        except (NotFound, Overloaded) as error:  # the source works
            fetch.fault = error.message
        except TimeoutError:
            fetch.fault, blamed = "not in time", True
        except (DeepFlowError, OSError) as error:
            fetch.fault, blamed = str(error), True
        except Exception as error:  # a mistake of ours is no reason to stop serving what is here
            fetch.fault, blamed = repr(error), True
            get(component="broker").exception("fetch_failed", source=fetch.source)
        finally:
            self._settle(fetch)
        if blamed:
            kind, _, where = fetch.source.partition(":")
            self.speeds.failed(fetch.source, time.monotonic())
            if kind == "remote":
                await self._remote.forget(where)

    async def _bring(self, fetch: _Fetch) -> None:
        """While one batch is written to the arena, the next one is read."""
        kind, todo = fetch.kind, fetch.hashes
        began = time.monotonic()
        came = await self._read(fetch, todo)
        start_s = came.start_s
        while came.pages:
            todo = todo[len(came.pages) :]
            writing = self._host.write(kind, came.pages)
            if todo:
                reading = self._read(fetch, todo)
                stored, after = await asyncio.gather(writing, reading, return_exceptions=True)
            else:
                stored, after = await writing, _NOTHING
            if isinstance(stored, BaseException):
                raise stored
            fetch.num_landed += len(stored)
            self.pages[fetch.source.partition(":")[0]] += len(stored)
            if len(stored) < len(came.pages):
                self._room_again = time.monotonic() + NO_ROOM_S
                raise Overloaded("the arena has no room for them")
            if isinstance(after, BaseException):
                raise after
            came = after
        now = time.monotonic()
        self.speeds.measured(
            fetch.source,
            start_s=start_s,
            num_bytes=len(fetch.hashes) * kind.slot_bytes,
            seconds=now - began - start_s,
            now=now,
        )

    async def _read(self, fetch: _Fetch, todo: list[bytes]) -> Batch:
        """The next pages of a fetch, at least one. Raises NotFound, and what the source raises."""
        source, _, where = fetch.source.partition(":")
        batch = max(1, BATCH_BYTES // fetch.kind.slot_bytes)
        if source == "ssd":
            came = Batch(await self._host.read_ssd(fetch.kind, todo[:batch]), start_s=0.0)
        else:
            when = fetch.limit.when()
            assert when is not None
            left_s = when - asyncio.get_running_loop().time()
            came = await self._remote.read(where, fetch.kind, todo[:batch], left_s)
        if not came.pages:
            raise NotFound("gone by then")
        return came

    def _settle(self, fetch: _Fetch) -> None:
        """It is over, however it ended: whoever waits for it can go on."""
        now = time.monotonic()
        num_bytes = len(fetch.hashes) * fetch.kind.slot_bytes
        self.num_bytes -= num_bytes
        self.speeds.queued(fetch.source, -num_bytes, now)
        for page in fetch.hashes:
            if self._moving.get(page) is fetch:
                del self._moving[page]
        if fetch.fault:
            self.faults[fetch.source.partition(":")[0]] += 1
        if not fetch.over.done():
            fetch.over.set_result(None)
        for ticket in fetch.tickets:
            if fetch.fault:
                ticket.decision.faults.append(f"{fetch.source}: {fetch.fault}")
            if all(other.over.done() for other in ticket.fetches):
                landed = sum(other.num_landed for other in ticket.fetches)
                wanted = sum(len(other.hashes) for other in ticket.fetches)
                ticket.decision.num_landed = landed
                outcome = "fetched" if landed == wanted else "partly" if landed else "failed"
                self._decided(ticket.decision, outcome, ticket.began)

    def _decided(self, decision: Decision, outcome: str, began: float) -> None:
        decision.outcome = outcome
        decision.took_us = (time.monotonic() - began) * 1e6
        self.outcomes[outcome] += 1

    # -------------------------------------------------------------------------------------------------------- upkeep

    def sweep(self) -> None:
        """Now and then: tickets that nobody has asked for are forgotten; what they brought stays in the arena."""
        expired = time.monotonic() - TICKET_S
        while self._tickets and next(iter(self._tickets.values())).began < expired:
            self._tickets.popitem(last=False)

    def heard(self, te: str, num_bytes: float, seconds: float) -> None:
        """What a TE has read from peers' devices since its start, and how long that took, by its own account."""
        bytes_before, seconds_before = self._peer_reads.get(te, (0.0, 0.0))
        if num_bytes > bytes_before and seconds > seconds_before:
            self._peer_reads[te] = (num_bytes, seconds)
            self.speeds.measured(
                "peer",
                start_s=None,
                num_bytes=round(num_bytes - bytes_before),
                seconds=seconds - seconds_before,
                now=time.monotonic(),
            )

    async def gone(self, holder: str) -> None:
        """A cache service or TE is no more: what is being read there fails at once."""
        now = asyncio.get_running_loop().time()
        for fetch in set(self._moving.values()):
            if fetch.source == f"remote:{holder}" and not fetch.limit.expired():
                fetch.limit.reschedule(now)
        self._peer_reads.pop(holder, None)
        for kind in ("remote", "peer"):
            self.speeds.forget(f"{kind}:{holder}")
        await self._remote.forget(holder)
