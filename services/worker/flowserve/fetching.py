"""The life of fetches: requests whose pages are brought to the device before they are computed.

A fetch is born when a request lacks full pages, and says which (a `Want`). Whoever can bring some hands in how; blocks
are taken for them, in the order of admission; the RTC executor fills them; what landed is held until the request is
admitted and finds it by the ordinary match. Whatever fails or comes too late, the request goes on without it, and
computes. This module must not know where the bytes come from.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from services.worker.flowserve.outcome import Want
from services.worker.flowserve.rtc.executor import Load, RtcExecutor
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.rtc.promise import Ticket
from services.worker.flowserve.scheduler import Scheduler
from services.worker.flowserve.sequence import Sequence, SequenceGroup, Status


@dataclass(slots=True, eq=False)
class _Part:
    """Pages that somebody can bring. It waits for room, then for the steps on their way (`after` is the youngest of
    them), then it is under way, then it has landed."""

    hashes: list[bytes]
    before: bytes | None
    load: Load
    ticket: Ticket | None = None
    after: object = None
    has_begun: bool = False


@dataclass(slots=True, eq=False)
class _Fetch:
    """One request's: the pages it lacks, behind `before`; how many of them were taken on; its tickets, the first of
    which holds what was there. `is_final`: nothing more will come."""

    sequence: Sequence
    hashes: list[bytes]
    before: bytes | None
    tickets: list[Ticket]
    num_taken: int = 0
    parts: list[_Part] = field(default_factory=list)
    is_final: bool = False


class Fetches:
    """All fetches of one engine, oldest first. `launches` are its steps on their way; `wants` are to be reported."""

    def __init__(
        self,
        rtc: RtcMaster,
        scheduler: Scheduler,
        executor: RtcExecutor,
        launches: Items[object],
        *,
        page: int,
    ) -> None:
        self.wants: list[Want] = []
        self._rtc = rtc
        self._scheduler = scheduler
        self._executor = executor
        self._launches = launches
        self._page = page
        self._fetches: dict[str, _Fetch] = {}  # by request

    def begin(self, group: SequenceGroup, page_s: float) -> None:
        """See what a request that was just taken in lacks. `page_s`: what computing a page takes."""
        request, sequence = group.request, group.sequences[0]
        if request.request in self._fetches:
            self._drop(self._fetches.pop(request.request))  # of the attempt before
        if sequence.status is not Status.WAITING:
            return
        rtc = self._rtc
        hashes = sequence.page_hashes((sequence.num_known - 1) // self._page)
        first = num_here = rtc.num_present(hashes)
        while first < len(hashes) and rtc.is_arriving(hashes[first]):
            first += 1
        if num_here == len(hashes):
            return
        guard = rtc.populate(hashes[:first], None)
        assert guard is not None, "it takes no block"
        before = hashes[first - 1] if first else None
        fetch = _Fetch(sequence, hashes[first:], before, [guard], is_final=first == len(hashes))
        self._fetches[request.request] = fetch
        self._scheduler.fetch(sequence)
        if not fetch.is_final:
            want = Want(
                request=request.request,
                attempt=request.attempt,
                hashes=fetch.hashes,
                parent=before or request.root,
                page_s=page_s,
                handover=group.handover,
            )
            self.wants.append(want)

    def populate(self, request: str, attempt: int, num_pages: int, load: Load) -> None:
        """As `Engine.populate`."""
        fetch = self._find(request, attempt)
        start = 0 if fetch is None else fetch.num_taken
        hashes = [] if fetch is None else fetch.hashes[start : start + num_pages]
        if fetch is None or not hashes:
            self._decline(load)
            return
        before = fetch.hashes[start - 1] if start else fetch.before
        fetch.parts.append(_Part(hashes, before, load))
        fetch.num_taken += len(hashes)

    def ready(self, request: str, attempt: int) -> None:
        """As `Engine.ready`."""
        fetch = self._find(request, attempt)
        if fetch is not None:
            fetch.is_final = True
            self._decline_parts(fetch)

    def advance(self) -> None:
        """Move every fetch on as far as it goes: before a step is planned."""
        self._scheduler.lacking = None
        if not self._fetches:
            return
        for request, fetch in list(self._fetches.items()):
            if fetch.sequence.status in (Status.RUNNING, Status.ENDED):
                self._drop(self._fetches.pop(request))  # and make room, also for older ones
        has_room = True
        scheduler = self._scheduler
        ranked = sorted(self._fetches.values(), key=lambda fetch: scheduler.turn(fetch.sequence))
        first = scheduler.waiting.first()
        if first is not None:
            self._yield(ranked, first, -(-first.num_known // self._page))
        for fetch in ranked:
            if fetch.sequence.status is Status.FETCHING:
                has_room = self._move(fetch, has_room)
        if scheduler.lacking is not None:
            self._yield(ranked, *scheduler.lacking)

    def close(self) -> None:
        """Nothing will be computed any more."""
        while self._fetches:
            self._drop(self._fetches.popitem()[1])

    # ------------------------------------------------------------------------------------------------------- internals

    def _find(self, request: str, attempt: int) -> _Fetch | None:
        """The fetch of this attempt, if more may come for it."""
        fetch = self._fetches.get(request)
        if fetch is None or fetch.sequence.group.request.attempt != attempt or fetch.is_final:
            return None
        return fetch if fetch.sequence.status is Status.FETCHING else None

    def _move(self, fetch: _Fetch, has_room: bool) -> bool:
        """Whether there is room for later ones."""
        for part in fetch.parts:
            if part.ticket is None and has_room:
                spare = self._scheduler.num_blocks_before(fetch.sequence)
                part.ticket = self._rtc.populate(part.hashes, part.before, spare=spare)
                if part.ticket is None:
                    has_room = False
                    self._scheduler.lacking = fetch.sequence, len(part.hashes) + spare
                    break
                fetch.tickets.append(part.ticket)
                part.after = self._launches[-1] if self._launches else None
            if part.ticket is None:
                break
            if not part.has_begun and part.after not in self._launches:
                self._load(part, part.ticket)
        is_over = fetch.is_final or fetch.num_taken == len(fetch.hashes)
        if (
            is_over
            and all(part.has_begun for part in fetch.parts)
            and not any(ticket.awaited or not ticket.is_landed for ticket in fetch.tickets)
        ):
            self._scheduler.fetched(fetch.sequence)
        return has_room

    def _yield(self, ranked: list[_Fetch], sequence: Sequence, num_blocks: int) -> None:
        """Let go of what was brought for lower bands than this one's, the last first, until so many blocks are
        available. They go on without; what is not evicted meanwhile they still find."""
        for fetch in reversed(ranked):
            other = fetch.sequence
            if num_blocks <= self._rtc.num_available or other.band <= sequence.band:
                return
            if any(ticket.held for ticket in fetch.tickets):
                self._drop(self._fetches.pop(other.group.request.request))
                if other.status is Status.FETCHING:
                    self._scheduler.fetched(other)

    def _load(self, part: _Part, ticket: Ticket) -> None:
        part.has_begun = True
        if not ticket.own:  # others bring it, or its predecessors are lost
            self._decline(part.load)
            return
        blocks: list[int | None] = [None] * len(part.hashes)
        for number, block in zip(ticket.own, ticket.blocks, strict=True):
            blocks[number] = block

        def land(num_ok: int) -> None:
            self._rtc.landed(ticket, sum(number < num_ok for number in ticket.own))

        self._executor.fill(blocks, part.load, land)

    def _drop(self, fetch: _Fetch) -> None:
        """The request runs, or has ended, or never will run. What has begun to move lands all the same."""
        self._decline_parts(fetch)
        for part in fetch.parts:
            if part.ticket is not None and not part.has_begun:
                part.has_begun = True
                if not part.ticket.is_landed:
                    self._rtc.landed(part.ticket, 0)
                self._decline(part.load)
        for ticket in fetch.tickets:
            self._rtc.close(ticket)

    def _decline_parts(self, fetch: _Fetch) -> None:
        """What has no blocks yet will not get any."""
        for part in fetch.parts:
            if part.ticket is None:
                self._decline(part.load)
        fetch.parts = [part for part in fetch.parts if part.ticket is not None]

    def _decline(self, load: Load) -> None:
        """Who handed it in waits for it to be called."""
        self._executor.fill([], load, lambda _: None)
