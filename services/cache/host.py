"""This host's arena and SSD as the event loop sees them: every call is a coroutine, every byte moves in a thread.

The store (`arena.py`) belongs to one thread, which also numbers what changed in it: events leave in the order in which
they happened. A second thread writes pages that come from elsewhere, a third reads and writes the SSD, so that neither
holds up the slots that a TE asks for. This module must not know the bus, nor why pages are wanted.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from services.cache.arena import Arena
from services.cache.changes import Changes
from services.cache.settings import CacheSettings
from services.cache.ssd import Ssd
from shared.arena.place import HOST_FILE, ArenaError, Place, automatic_bytes
from shared.arena.reader import Reader, ReadSegment
from shared.arena.segment import PageKind, SlotHeader
from shared.arena.writer import Writer
from shared.blockhash import DIGEST_BYTES
from shared.errors import InvalidRequest, Unavailable
from shared.rtc_messages import (
    BlockEvents,
    BlocksDump,
    Commit,
    Copied,
    Copy,
    LeaseRequest,
    Populate,
    Slot,
)
from shared.subjects import encode

T = TypeVar("T")
Page = tuple[bytes, npt.NDArray[np.uint8]]  # its hash, and what it holds
Announce = Callable[[list[BlockEvents]], None]

MAX_PAGES: Final = 16_384  # in one question
EVENT_PAGES: Final = 16_384  # in one message: well below what the bus takes
DUMP_PAGES: Final = 400_000  # likewise; a host with more tells of the rest by its later events only
_OWN_SHARE: Final = 8  # one segment in so many may be ours before we have pages to put there
_NO_KIND: Final = PageKind("", "", 1)  # where no page is asked for
_SPILL_PAGES: Final = 16  # at a time, so that nobody waits long for the SSD


def kind_of(ask: Copy | Populate | LeaseRequest) -> PageKind:
    """Which kind of pages somebody asks for. Raises InvalidRequest for one that cannot be."""
    if ask.slot_bytes <= 0:
        raise InvalidRequest("of which size are the pages?", param="slot_bytes")
    try:
        encode(ask.model)  # events about them will need it
    except ValueError as error:
        raise InvalidRequest(str(error), param="model") from error
    return PageKind(ask.model, ask.recipe, ask.slot_bytes)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


class Host:
    """The tiers of this host, and the ownership of them. `announce` hears each change, in the loop and in order."""

    def __init__(
        self, settings: CacheSettings, place: Place, owner: str, announce: Announce
    ) -> None:
        directory = place.directory
        self.name = place.host
        self.max_bytes = settings.arena_bytes or automatic_bytes(directory)
        self.counts: Counter[str] = Counter()
        self.models: list[str] = []  # that pages were heard of
        self.accounts: dict[str, Any] = {}  # the ledger as of the last call
        self.given = asyncio.Event()  # slots, since somebody cleared it
        self.ssd_fault = ""
        self._settings = settings
        self._place = place
        self._host_file = directory / HOST_FILE
        self._inode = _inode(self._host_file)
        self._owner = owner
        self._announce = announce
        self._loop = asyncio.get_running_loop()
        self._numbers: Counter[str] = Counter()  # by model: of the last event
        self._kinds: set[PageKind] = set()  # that we have a segment for, or have asked for one
        self._arena = Arena(
            directory,
            max_bytes=self.max_bytes,
            segment_bytes=min(settings.segment_bytes, self.max_bytes),
            epoch=place.epoch,
        )
        self._num_own = self.max_bytes // settings.segment_bytes // _OWN_SHARE
        self._ssd: Ssd | None = None
        self._reader = Reader(directory)
        self._writer = Writer(directory)
        self._store, self._pages, self._files = (
            ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("store", "pages", "ssd")
        )

    async def open(self) -> None:
        """Index what is there already. An SSD folder that is not fit for use, or in use, is done without."""
        settings = self._settings
        if settings.ssd_bytes:
            opening = partial(Ssd.open, settings.ssd_dir, max_bytes=settings.ssd_bytes)
            try:
                self._ssd = await self._loop.run_in_executor(self._files, opening)
            except ArenaError as error:
                self.ssd_fault = str(error)
        await self._call(self._arena.rebuild, time.monotonic())

    async def close(self) -> None:
        """Give back our own segments and the ownership; all files stay."""
        await self._loop.run_in_executor(None, self._close)

    def _close(self) -> None:
        for executor in (self._files, self._pages, self._store):
            executor.shutdown()
        self._writer.close()
        self._reader.close()
        self._arena.close()
        if self._ssd is not None:
            self._ssd.close()
        self._place.close()

    # ---------------------------------------------------------------------------------------------- slots and pages

    async def copy(self, ask: Copy) -> Copied:
        """Slots for a TE's pages. Raises InvalidRequest."""
        kind = kind_of(ask)
        if not ask.te or len(ask.hashes) > MAX_PAGES:
            raise InvalidRequest(f"a name is needed, and at most {MAX_PAGES} pages")
        copied = await self._call(
            self._arena.reserve,
            ask.te,
            kind,
            ask.hashes,
            held=ask.held,
            keep=ask.keep,
            now=time.monotonic(),
        )
        if any(copied.slots) and kind not in self._kinds and len(self._kinds) < self._num_own:
            self._kinds.add(kind)
            await self._loop.run_in_executor(self._pages, self._claim, kind)
        self.given.set()
        self.counts["reserved"] += sum(slot is not None for slot in copied.slots)
        self.counts["refused"] += copied.num_refused
        return copied

    async def commit(self, commit: Commit) -> int:
        """Take in what a TE wrote; how many pages are new."""
        new = await self._call(self._arena.commit, commit, time.monotonic())
        self.counts["committed"] += len(new)
        return len(new)

    async def find(self, kind: PageKind, hashes: Sequence[bytes]) -> list[Slot]:
        """The slots of the longest prefix that is in the arena."""
        return await self._look(self._arena.find, kind, hashes)

    async def free(self, keep: str) -> bool:
        """An explicit context cache has ended."""
        return await self._call(self._arena.free, keep)

    async def write(self, kind: PageKind, pages: Sequence[Page]) -> list[bytes]:
        """Put pages that came from elsewhere into segments of our own. The hashes of those that are in the arena now:
        the leading ones, for without its parent a page is of no use."""
        return await self._loop.run_in_executor(self._pages, self._write, kind, pages)

    async def read_ssd(self, kind: PageKind, hashes: Sequence[bytes]) -> list[Page]:
        """The leading ones of these pages that the SSD has whole."""
        return await self._loop.run_in_executor(self._files, self._read_ssd, kind, hashes)

    @property
    def has_ssd(self) -> bool:
        """Whether there is an SSD tier."""
        return self._ssd is not None

    async def spill(self) -> int:
        """Copy pages that will soon be evicted to the SSD, a few at a time; how many."""
        assert self._ssd is not None
        return await self._loop.run_in_executor(self._files, self._spill, self._ssd)

    async def lease(
        self, lease: str, kind: PageKind, hashes: Sequence[bytes], until: float
    ) -> list[tuple[Slot, SlotHeader]]:
        """Pin the leading ones of these pages that are in one segment, and say what their slots hold."""
        return await self._call(self._lease, lease, kind, hashes, until)

    async def release(self, lease: str) -> bool:
        """Unpin; whether it was pinned until now."""
        return await self._call(self._arena.release, lease)

    def segment(self, name: str) -> ReadSegment | None:
        """A segment, mapped for reading."""
        return self._reader.segment(name)

    # ------------------------------------------------------------------------------------------------------- upkeep

    async def poll(self) -> None:
        """About once a second: whatever has run out ends, whatever has gone is let go of, and segments of our own that
        others need are given back. Raises Unavailable if the folder was removed: nobody finds this arena any more."""
        if _inode(self._host_file) != self._inode:
            raise Unavailable(f"somebody removed {self._host_file}")
        self._reader.sweep()
        await self._call(self._arena.poll, time.monotonic())
        if self._writer.held:
            await self._loop.run_in_executor(self._pages, self._give_back)

    async def down(self, holder: str) -> None:
        """A writer was declared dead."""
        await self._call(self._arena.down, holder, time.monotonic())

    async def dump(self, model: str) -> BlocksDump:
        """All pages of a model, as of the last event."""
        return await self._look(self._dump, model)

    # ------------------------------------------------------------------------------------------- in the store's thread

    async def _look(self, work: Callable[..., T], *args: Any) -> T:
        """For what changes nothing that there are events or accounts of: those take longer than it does."""
        return await self._loop.run_in_executor(self._store, partial(work, *args))

    async def _call(self, work: Callable[..., T], *args: Any, **named: Any) -> T:
        return await self._loop.run_in_executor(
            self._store, self._work, partial(work, *args, **named)
        )

    def _work(self, work: Callable[[], T]) -> T:
        try:
            return work()
        finally:
            self._tell()

    def _ask(self, work: Callable[[], T]) -> T:
        """From one of the other threads."""
        return self._store.submit(self._work, work).result()

    def _tell(self) -> None:
        """Number what has changed, and pass it on to the loop."""
        events = self._events(self._arena.drain_events(), "host")
        if self._ssd is not None:
            events += self._events(self._ssd.drain_events(), "ssd")
        accounts: dict[str, Any] = {"arena": self._arena.ledger()}
        if self._ssd is not None:
            accounts["ssd"] = self._ssd.ledger()
        self.accounts = accounts
        if events:
            self.models = sorted(self._numbers)
            self._loop.call_soon_threadsafe(self._announce, events)

    def _events(self, changes: dict[str, Changes], tier: str) -> list[BlockEvents]:
        events = []
        for model, change in changes.items():
            stored, removed = iter(change.stored), iter(change.removed)
            while True:
                gone = list(islice(removed, EVENT_PAGES))
                new = list(islice(stored, EVENT_PAGES - len(gone)))
                if not gone and not new:
                    break
                self._numbers[model] += 1
                events.append(
                    BlockEvents(
                        te=self._owner,
                        model=model,
                        seq=self._numbers[model],
                        stored=new,
                        removed=gone,
                        tier=tier,
                    )
                )
        return events

    def _dump(self, model: str) -> BlocksDump:
        hashes = self._arena.pages(model)[:DUMP_PAGES]
        ssd = [] if self._ssd is None else self._ssd.pages(model)[: DUMP_PAGES - len(hashes)]
        return BlocksDump(
            te=self._owner,
            model=model,
            seq=self._numbers[model],
            hashes=hashes,
            tier="host",
            ssd=ssd,
        )

    def _lease(
        self, lease: str, kind: PageKind, hashes: Sequence[bytes], until: float
    ) -> list[tuple[Slot, SlotHeader]]:
        slots = self._arena.find(kind, hashes)
        segment = self._reader.segment(slots[0].segment) if slots else None
        if segment is None:
            return []
        held = []
        for slot in takewhile(lambda slot: slot.segment == segment.name, slots):
            header = segment.header(slot.index)
            if header is None or header.generation != slot.generation:
                break
            held.append((slot, header))
        if not held or not self._arena.lease(lease, [slot for slot, _ in held], until):
            return []
        return held

    # --------------------------------------------------------------------------------------------- in the other threads

    def _write(self, kind: PageKind, pages: Sequence[Page]) -> list[bytes]:
        hashes = [page_hash for page_hash, _ in pages]
        copied = self._reserve(kind, hashes)
        returned = self._writer.lock(copied.granted)
        written, dropped = [], []
        for slot, (page_hash, data) in zip(copied.slots, pages, strict=True):
            if slot is None:
                continue
            if self._writer.write(slot, page_hash, data):
                written.append(slot)
            else:
                dropped.append(slot)
        returned += self._writer.give_back(copied.wanted)
        commit = Commit(te=self._owner, written=written, dropped=dropped, returned=returned)
        new = self._ask(partial(self._arena.commit, commit, time.monotonic()))
        self.counts["brought"] += len(new)
        return hashes[: self._store.submit(self._arena.holds, kind, hashes).result()]

    def _claim(self, kind: PageKind) -> None:
        """Have a segment before the TEs have them all: who fetches has no time to wait for one."""
        copied = self._reserve(kind, [bytes(DIGEST_BYTES)])
        returned = self._writer.lock(copied.granted)
        unused = [slot for slot in copied.slots if slot is not None]
        commit = Commit(te=self._owner, dropped=unused, returned=returned)
        self._ask(partial(self._arena.commit, commit, time.monotonic()))

    def _give_back(self) -> None:
        returned = self._writer.give_back(self._reserve(_NO_KIND, []).wanted)
        if returned:
            commit = Commit(te=self._owner, returned=returned)
            self._ask(partial(self._arena.commit, commit, time.monotonic()))

    def _reserve(self, kind: PageKind, hashes: Iterable[bytes]) -> Copied:
        return self._ask(
            partial(
                self._arena.reserve,
                self._owner,
                kind,
                list(hashes),
                held=self._writer.held,
                keep=None,
                now=time.monotonic(),
            )
        )

    def _read_ssd(self, kind: PageKind, hashes: Sequence[bytes]) -> list[Page]:
        pages: list[Page] = []
        if self._ssd is None:
            return pages
        for page_hash in hashes:
            data = np.empty(kind.slot_bytes, np.uint8)
            if not self._ssd.read(kind, page_hash, data.data):
                break
            pages.append((page_hash, data))
        return pages

    def _spill(self, ssd: Ssd) -> int:
        every = self._settings.ssd_all
        victims = self._ask(partial(self._arena.to_spill, _SPILL_PAGES, every=every))
        done = []
        for victim in victims:
            data = np.empty(victim.kind.slot_bytes, np.uint8)
            if self._reader.read(victim.slot, victim.page_hash, data) and ssd.append(
                victim.kind, victim.page_hash, data.data
            ):
                done.append(victim)
        if done:
            self._ask(partial(self._arena.spilled, done))
        self.counts["spilled"] += len(done)
        return len(done)
