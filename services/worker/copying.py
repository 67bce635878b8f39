"""Write-through: what the device's index holds is copied to the host's arena, in the background.

The cache service grants slots, the engine's second thread writes them, the cache service is told. One batch at a time,
so that a segment that is to be given back has nothing under way. This module must not know what the pages are for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, Final

from shared.arena.writer import Writer
from shared.errors import DeepFlowError
from shared.messages import Keep
from shared.rtc_messages import Commit, Copied, Copy
from shared.table import heed_cancellation

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from services.worker.flowserve.decoder import View
    from services.worker.loop import EngineLoop
    from shared.bus import Bus
    from shared.log import Logger
    from shared.rtc_messages import Slot

    Batch = tuple[Keep | None, list[bytes]]

COUNTERS: Final = ("copied_pages", "copied_bytes", "copy_refused", "copy_failures")
_MAX_PAGES: Final = 64  # of one batch
_MAX_KEPT: Final = 4096  # batches of pages of context caches that wait for an arena
_ASK_S: Final = 2.0
_PAUSES_S: Final = (0.25, 5.0)  # after a failure: the first, and the longest
_RETURN_S: Final = (
    2.0  # how often a TE that copies nothing asks whether its segments are wanted back
)
_NO_ROOM_S: Final = 1.0  # before an arena that was full is asked again


class Copying:
    """What is to be copied, and the segments of the arena that this TE writes to. `run` is to be run as a task."""

    def __init__(
        self,
        bus: Bus,
        loop: EngineLoop,
        folder: Path,
        log: Logger,
        *,
        te: str,
        model: str,
        recipe: str,
        slot_bytes: int,
    ) -> None:
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._bus = bus
        self._loop = loop
        self._writer = Writer(folder)
        self._is_stale = False  # what the writer has is of an arena that is gone
        self._log = log
        self._te, self._model, self._recipe = te, model, recipe
        self._slot_bytes = slot_bytes
        self._host = ""  # of the arena; "" while there is none
        # Of pages in the device's index, which bounds them.
        self._due: OrderedDict[bytes, None] = OrderedDict()
        self._kept: deque[tuple[Keep, list[bytes]]] = deque(maxlen=_MAX_KEPT)  # these go first
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._failing = False

    # ------------------------------------------------------------------------------------------------ what comes in

    def moved(self, host: str, index: Iterable[bytes]) -> None:
        """The arena is another one, or there is none any more (""): all of the index is to be copied anew."""
        self._host = host
        self._is_stale = True
        self._due.clear()
        self.changed(index, ())

    def changed(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """The device's index has changed."""
        for page_hash in removed:
            self._due.pop(page_hash, None)
        if self._host:
            self._due.update(dict.fromkeys(stored))
            self._wake()

    def keep(self, keep: Keep, hashes: list[bytes]) -> None:
        """Have these pages in the arena until the context cache that they belong to ends."""
        for start in range(0, len(hashes), _MAX_PAGES):
            self._kept.append((keep, hashes[start : start + _MAX_PAGES]))
        self._wake()

    def _wake(self) -> None:
        if self._host and (self._due or self._kept):
            self._idle.clear()
            self._news.set()

    # ------------------------------------------------------------------------------------------------- what is done

    async def run(self) -> None:
        """Copy what is due, for ever."""
        pause_s = _PAUSES_S[0]
        while True:
            heed_cancellation()
            if self._is_stale:
                self._writer.close()
                self._is_stale = False
            batch: Batch | None = self._next()
            if batch is None:
                self._news.clear()
                self._idle.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RETURN_S):
                        await self._news.wait()
                if self._news.is_set() or not self._writer.held or not self._host:
                    continue
                batch = None, []  # others may want the segments that we have
            try:
                num_refused = await self._copy(*batch)
            except DeepFlowError as error:
                self._put_back(*batch)
                self._fail(error)
                self._idle.set()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSES_S[1])
                continue
            self._failing, pause_s = False, _PAUSES_S[0]
            if num_refused:
                self.counters["copy_refused"] += num_refused
                self._idle.set()
                await asyncio.sleep(_NO_ROOM_S)

    async def finish(self) -> None:
        """Wait until nothing is due any more, or nothing can be copied at present."""
        await self._idle.wait()

    def _next(self) -> Batch | None:
        if not self._host:
            return None
        if self._kept:
            return self._kept.popleft()
        num_pages = min(len(self._due), _MAX_PAGES)
        hashes = [self._due.popitem(last=False)[0] for _ in range(num_pages)]
        return (None, hashes) if hashes else None

    def _put_back(self, keep: Keep | None, hashes: list[bytes]) -> None:
        """For another try; behind the others, some of it may be gone by then."""
        if keep is not None:
            self._kept.appendleft((keep, hashes))
        else:
            self._due.update(dict.fromkeys(hashes))

    def _fail(self, error: DeepFlowError) -> None:
        self.counters["copy_failures"] += 1
        if not self._failing:  # once an outage
            self._failing = True
            self._log.warning("copy_failed", host=self._host, error=error.message)

    async def _copy(self, keep: Keep | None, hashes: list[bytes]) -> int:
        """Copy one batch; how many pages the arena had no room for."""
        host, subjects = self._host, self._bus.subjects
        ask = Copy(
            te=self._te,
            model=self._model,
            recipe=self._recipe,
            slot_bytes=self._slot_bytes,
            hashes=hashes,
            held=self._writer.held,
            keep=keep,
        )
        copied = await self._bus.request(subjects.rtc("copy", host), ask, Copied, timeout_s=_ASK_S)
        returned = await asyncio.to_thread(self._writer.lock, copied.granted)
        slots = {h: slot for h, slot in zip(hashes, copied.slots, strict=False) if slot is not None}
        written = await self._write(slots) if slots else set()
        returned += self._writer.give_back(copied.wanted)
        if slots or returned:
            commit = Commit(
                te=self._te,
                written=[slot for page_hash, slot in slots.items() if page_hash in written],
                dropped=[slot for page_hash, slot in slots.items() if page_hash not in written],
                returned=returned,
            )
            await self._bus.publish(subjects.rtc("commit", host), commit)
        self.counters["copied_pages"] += len(written)
        self.counters["copied_bytes"] += len(written) * self._slot_bytes
        return copied.num_refused

    async def _write(self, slots: dict[bytes, Slot]) -> set[bytes]:
        """Write those pages that are still on the device; which ones."""
        done: asyncio.Future[set[bytes]] = asyncio.get_running_loop().create_future()

        def save(pages: list[tuple[bytes, View]]) -> list[bytes]:
            written: list[bytes] = []
            try:
                for page_hash, view in pages:
                    if self._writer.write(slots[page_hash], page_hash, view.data):
                        written.append(page_hash)
            finally:
                self._loop.call(_resolve, done, set(written))
            return written

        self._loop.post(lambda engine, _: engine.copy_out(list(slots), save))
        return await done

    def close(self) -> None:
        """Let go of all segments; what is in them stays in the arena."""
        self._writer.close()


def _resolve(done: asyncio.Future[set[bytes]], written: set[bytes]) -> None:
    if not done.done():
        done.set_result(written)
