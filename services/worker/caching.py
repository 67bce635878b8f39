"""The shell's context-caching module: where the KV of a prompt comes from, if not from computing it.

A request whose pages the device lacks is *wanted* by the engine. Each want is a task here: it asks the cache service of
this host, reads what a peer has, hands the engine what is to be copied to the device, and says when nothing more will
come. There is a deadline on it, no longer than computing would take; whatever fails, the request is computed. So a
cache that is gone costs time, never an answer. This module must not know tokens, nor how blocks are kept.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from services.worker.copying import Copying
from services.worker.peers import Peers
from shared.arena.place import read_host
from shared.arena.reader import Reader
from shared.errors import DeepFlowError
from shared.rtc_messages import Free, Populate, Populated, QueryPopulate

if TYPE_CHECKING:
    from typing import Any

    from services.worker.flowserve.decoder import View
    from services.worker.flowserve.engine import Engine
    from services.worker.flowserve.outcome import Want
    from services.worker.flowserve.rtc.executor import Load
    from services.worker.linking import Linking
    from services.worker.loop import EngineLoop, Report
    from services.worker.settings import TeSettings
    from shared.borrower import Pages
    from shared.messages import Handover, Task
    from shared.rtc_messages import Slot
    from shared.service import Service


COUNTERS: Final = (
    "fetches",  # wants of which something was asked for
    "fetch_hits",  # of these, some page came
    "fetch_late",  # of these, the deadline came first
    "fetch_failures",  # of these, something went wrong
    "fetched_arena",  # pages
    "fetched_peer",  # pages
    "fetched_bytes",
    "peer_bytes",  # read from peers' devices, by what the cache service knows how fast those are
    "peer_us",
    "fetch_lost",  # pages that had been found, and were not there any more when they were read
)
_LOOK_S: Final = 1.0  # how soon another arena, or its end, is noticed
_POLL_S: Final = (
    0.25  # as long as the cache service may keep an answer back: so late is its death seen
)
_PATIENCE: Final = 0.25  # of what computing takes: how long a long fetch may take
_BACK_OFF_S: Final = (
    1.0  # before it is asked again after it did not answer: others need not wait too
)
_GRACE_S: Final = 0.25  # for an answer to come, beyond that
_PRIOR_BYTES_S: Final = 4e9  # from the arena to the device, until it was measured
_SMOOTHING: Final = 0.2
_NUM_RECORDS: Final = 32


@dataclass(slots=True, kw_only=True)
class _Record:
    """How one fetch went, in pages, for whoever asks later."""

    request: str
    wanted: int
    came: dict[str, int] = field(default_factory=lambda: {"arena": 0, "peer": 0})
    took_ms: int = 0
    why: str = ""


class Caching:
    """Fetches, write-through and the peers' leases of one TE. Made before the engine, `open`ed when it is ready."""

    def __init__(
        self,
        service: Service[TeSettings],
        settings: TeSettings,
        loop: EngineLoop,
        linking: Linking,
        recipe: str,
    ) -> None:
        self._service = service
        self._settings = settings
        self._bus = service.bus
        self._log = service.log
        self._loop = loop
        self._linking = linking
        self._te, self._model, self._recipe = service.id, settings.model, recipe
        self._folder = settings.arena_dir
        self._counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._reader = Reader(self._folder)
        self._records: deque[_Record] = deque(maxlen=_NUM_RECORDS)
        self._page_bytes = 0
        self._load_s = 0.0  # of one page from the arena, as measured
        self._copying: Copying | None = None
        self._peers: Peers | None = None
        self._handovers: dict[tuple[str, int], Handover] = {}  # of tasks that do not run yet
        self._has_leases = False
        self._ask_again = 0.0  # when to ask a cache service again that did not answer
        self.host = ""  # of the arena; "" without one

    async def open(self, engine: Engine) -> None:
        """The engine is there: serve its pages to peers, and bring them to the arena."""
        self._page_bytes = engine.page_bytes
        self._load_s = self._page_bytes / _PRIOR_BYTES_S
        if not engine.movable:
            self._log.info("no_kv_transfer", why="this decoder's blocks cannot be moved")
            return
        self._peers = Peers(
            self._bus, self._loop, self._linking, model=self._model, recipe=self._recipe
        )
        self._copying = Copying(
            self._bus,
            self._loop,
            self._folder,
            self._log,
            te=self._te,
            model=self._model,
            recipe=self._recipe,
            slot_bytes=self._page_bytes,
        )
        self._peers.serve(engine)
        await self._bus.listen(self._bus.subjects.rtc("free"), (Free,), self._free)
        for name, work in (
            ("copying", self._copying.run()),
            ("arena", self._watch(self._copying)),
        ):
            self._service.tasks.create_task(work, name=name)

    async def finish(self) -> None:
        """Wait until all that is indexed is in the arena."""
        if self._copying is not None:
            await self._copying.finish()

    def close(self) -> None:
        """After the engine's end: let go of segments and mappings."""
        if self._copying is not None:
            self._copying.close()
        self._reader.close()

    @property
    def counters(self) -> Counter[str]:
        """For beats; they only grow."""
        counters = self._counters.copy()
        if self._copying is not None and self._peers is not None:
            counters.update(self._copying.counters)
            counters["leases"] = self._peers.num_leases
        return counters

    def status(self) -> dict[str, Any]:
        """For people: the arena, and how the last fetches went."""
        return {"arena": self.host, "fetches": [asdict(record) for record in self._records]}

    # ------------------------------------------------------------------------------------------- what the engine says

    def take(self, report: Report) -> None:
        """See to what the engine reports. Never waits."""
        self._has_leases = bool(report.ledger.get("leased"))
        if self._handovers:
            for _, delta in report.deltas:  # it runs, or is over: what it needed of others it has
                self._let_go(delta.request, delta.attempt)
            for ended in report.ended:
                self._let_go(ended.request, ended.attempt)
        if self._copying is not None:
            self._copying.changed(report.stored, report.removed)
            for kept in report.kept:
                self._copying.keep(kept.keep, kept.hashes)

    def expect(self, task: Task) -> None:
        """A task was taken. What another TE holds for it is let go once it runs here, whether it was fetched or not."""
        if task.handover is not None and task.handover.lease:
            self._handovers[task.request.request, task.request.attempt] = task.handover

    def _let_go(self, request: str, attempt: int) -> None:
        handover = self._handovers.pop((request, attempt), None)
        if handover is not None and handover.te != self._te and self._peers is not None:
            release = self._peers.release(handover.te, handover.lease)
            self._service.tasks.create_task(release, name="let-go")

    def _free(self, free: Free) -> None:
        self._loop.post(lambda engine, _: engine.drop(free.keep))

    async def _watch(self, copying: Copying) -> None:
        """Notice the arena's coming, its end, and another one in its place."""
        while True:
            host = read_host(self._folder)
            if host != self.host:
                self._log.info("arena_changed", arena=host or None, before=self.host or None)
                self.host = host
                index = await self._loop.ask(lambda engine, _: engine.index_snapshot())
                copying.moved(host, index)
            self._reader.sweep()
            if self._has_leases:  # an engine without work notices no end of a lease
                self._loop.wake()
            await asyncio.sleep(_LOOK_S)

    # ------------------------------------------------------------------------------------------------------- fetching

    def want(self, want: Want, engine: Engine) -> None:
        """A request lacks pages: fetch them, unless computing them takes no longer than asking. In the engine's thread,
        before the step, which waits for nothing here."""
        compute_s = want.page_s * len(want.hashes)
        settings = self._settings
        if (self._has_arena() or want.handover) and compute_s >= settings.fetch_min_s:
            # A stalled source is noticed by whoever reads from it; this bounds what a slow one may cost.
            patience_s = max(settings.fetch_timeout_s, compute_s * _PATIENCE)
            self._loop.call(self._begin, want, min(compute_s, patience_s))
        else:
            engine.ready(want.request, want.attempt)

    def _begin(self, want: Want, budget_s: float) -> None:
        self._service.tasks.create_task(self._fetch(want, budget_s), name="fetch")

    def _has_arena(self) -> bool:
        """Whether there is an arena, and its cache service did answer of late."""
        return bool(self.host) and time.monotonic() >= self._ask_again

    def _ready(self, want: Want) -> None:
        self._loop.post(lambda engine, _: engine.ready(want.request, want.attempt))

    async def _fetch(self, want: Want, budget_s: float) -> None:
        """Bring what can be had of `want` within `budget_s`, and let the request run."""
        began = time.monotonic()
        record = _Record(request=want.request, wanted=len(want.hashes))
        self._records.append(record)
        self._counters["fetches"] += 1
        try:
            async with asyncio.timeout(budget_s):
                await self._gather(want, record, began + budget_s)
        except TimeoutError:
            self._counters["fetch_late"] += 1
            record.why += "; too late"
        except Exception as error:  # whatever it is, the request can be computed
            self._fail(record, error)
        finally:
            self._ready(want)
            record.took_ms = round((time.monotonic() - began) * 1000)
            self._let_go(want.request, want.attempt)

    def _fail(self, record: _Record, error: Exception) -> None:
        """A cache or a peer that is gone is an everyday thing, and every request would tell of it."""
        self._counters["fetch_failures"] += 1
        number = self._counters["fetch_failures"]
        record.why += f"; {error}"
        if number.bit_count() == 1:  # the first, and then ever more rarely
            fault = None if isinstance(error, DeepFlowError) else error
            self._log.warning("fetch_failed", error=str(error), num=number, exc_info=fault)

    async def _gather(self, want: Want, record: _Record, deadline: float) -> None:
        """From the arena, and what it lacks from the peer that is said to have it; once more without that peer, if it
        does not give it."""
        num, avoid = 0, ""
        for _ in range(2):
            found = await self._find(want, record, deadline, num, avoid)
            slots = found.slots[: len(want.hashes) - num]
            load = partial(self._load, slots, want.hashes[num:])
            landed = await self._land(want, record, "arena", len(slots), load)
            if landed is None:
                return
            num += landed
            if landed < len(slots):
                self._counters["fetch_lost"] += len(slots) - landed
                return
            peer, stop, lease = found.peer, num - landed + found.peer_pages, ""
            if want.handover is not None and not avoid:
                peer, stop, lease = want.handover.te, len(want.hashes), want.handover.lease
                record.why += f"; handed over by {peer}"
            try:
                while peer not in ("", self._te) and num < stop and self._peers is not None:
                    left_s = deadline - time.monotonic()
                    began = time.monotonic()
                    async with self._peers.read(
                        peer, want.hashes[num:stop], left_s, lease
                    ) as pages:
                        self._counters["peer_bytes"] += len(pages) * self._page_bytes
                        self._counters["peer_us"] += round((time.monotonic() - began) * 1e6)
                        fill = partial(_fill, pages)
                        landed = await self._land(want, record, "peer", len(pages), fill)
                    if not landed:
                        return
                    num += landed
            except DeepFlowError as error:
                self._fail(record, error)
                avoid = peer
            else:
                return

    async def _find(
        self, want: Want, record: _Record, deadline: float, num: int, avoid: str
    ) -> Populated:
        """What the cache service says about the pages from `num` on; nothing where there is none that answers."""
        found = Populated()
        if self._has_arena():
            try:
                found = await self._ask(want, deadline, num, avoid)
            except DeepFlowError as error:  # there may be a peer all the same
                self._ask_again = time.monotonic() + _BACK_OFF_S
                self._fail(record, error)
        record.why += found.why
        return found

    async def _ask(self, want: Want, deadline: float, num: int, avoid: str) -> Populated:
        """Where the cache service says that the pages are. What is on its way is waited for, while there is time."""
        subjects, host = self._bus.subjects, self.host
        wait_s = min(_POLL_S, max(deadline - time.monotonic(), 0.0))
        ask = Populate(
            te=self._te,
            model=self._model,
            recipe=self._recipe,
            slot_bytes=self._page_bytes,
            hashes=want.hashes[num:],
            page_us=round(want.page_s * 1e6),
            load_us=round(self._load_s * 1e6),
            wait_ms=round(wait_s * 1000),
            avoid=[avoid] if avoid else [],
        )
        found = await self._bus.request(
            subjects.rtc("populate", host), ask, Populated, timeout_s=wait_s + _GRACE_S
        )
        while found.ticket:
            left_s = deadline - time.monotonic() - self._load_s * len(found.slots)
            if left_s <= 0:  # what is there by now has to do
                break
            wait_s = min(_POLL_S, left_s)
            query = QueryPopulate(ticket=found.ticket, wait_ms=round(wait_s * 1000))
            found = await self._bus.request(
                subjects.rtc("query", host), query, Populated, timeout_s=wait_s + _GRACE_S
            )
        return found

    async def _land(
        self, want: Want, record: _Record, source: str, num_pages: int, load: Load
    ) -> int | None:
        """Have the engine make room for the next `num_pages` of a want and `load` them; how many arrived. None: it has
        no use for them any more, or others bring them. What has begun arrives also if nobody waits for it any more."""
        if not num_pages:
            return 0
        landed: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

        def run(views: list[View]) -> int:
            num = None
            try:
                num = load(views) if views else None
            finally:
                self._loop.call(self._landed, record, source, num, landed)
            return num or 0

        self._loop.post(
            lambda engine, _: engine.populate(want.request, want.attempt, num_pages, run)
        )
        return await landed

    def _landed(
        self, record: _Record, source: str, num: int | None, landed: asyncio.Future[int | None]
    ) -> None:
        if num:
            self._counters["fetch_hits"] += not any(record.came.values())
            self._counters[f"fetched_{source}"] += num
            self._counters["fetched_bytes"] += num * self._page_bytes
            record.came[source] += num
        if not landed.done():
            landed.set_result(num)

    def _load(self, slots: list[Slot], hashes: list[bytes], views: list[View]) -> int:
        """In the engine's second thread: read slots of the arena, as far as they still hold what they should."""
        began = time.perf_counter()
        num = 0
        for slot, page_hash, view in zip(slots, hashes, views, strict=False):
            if not self._reader.read(slot, page_hash, view.data):
                break
            num += 1
        if num:
            took_s = (time.perf_counter() - began) / num
            self._load_s += _SMOOTHING * (took_s - self._load_s)
        return num


def _fill(pages: Pages, views: list[View]) -> int:
    for page, view in zip(pages, views, strict=False):
        view[:] = page
    return min(len(pages), len(views))
