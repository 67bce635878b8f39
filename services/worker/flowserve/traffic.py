"""Pages that come and go: what an engine offers to whoever moves KV between devices, hosts and tiers.

They move in a second thread, while steps go on; what moves, and when, is decided by the RTC master and `fetching.py`.
This module must not know where pages come from and go to, nor how steps are computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from services.worker.flowserve.decoder import Decoder, Movable, View
from services.worker.flowserve.fetching import Fetches
from services.worker.flowserve.handover import Bequests
from services.worker.flowserve.outcome import StepOutput, Want
from services.worker.flowserve.rtc.executor import Load, RtcExecutor, Save
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.rtc.promise import Lease
from services.worker.flowserve.scheduler import Scheduler
from services.worker.flowserve.stream import Launch


class Traffic:
    """The part of an `Engine` that is about pages. All calls belong to the engine's thread.

    `wake` is called, in another thread, when bytes have moved and `has_work` may be true again.
    """

    def __init__(
        self,
        decoder: Decoder,
        rtc: RtcMaster,
        scheduler: Scheduler,
        launches: deque[Launch],
        *,
        page: int,
        clock: Callable[[], float],
        wake: Callable[[], None] | None,
    ) -> None:
        self.decoder = decoder
        self._rtc = rtc
        self._launches = launches  # on their way, oldest first
        self._clock = clock
        self._bequests = Bequests(rtc, page=page)
        self._executor: RtcExecutor | None = None
        self._fetches: Fetches | None = None
        if isinstance(decoder, Movable):
            self._executor = RtcExecutor(decoder, wake)
            self._fetches = Fetches(rtc, scheduler, self._executor, launches, page=page)
        # Nothing can be computed until something is handed in or has moved.
        self._is_stuck = False

    @property
    def movable(self) -> bool:
        """Whether pages can come and go at all; if not, there are no wants, and nothing is ever copied or leased."""
        return self._executor is not None

    @property
    def page_bytes(self) -> int:
        """Size of a block over all layers; 0 if it cannot be moved."""
        return self.decoder.block_bytes if isinstance(self.decoder, Movable) else 0

    def memory(self) -> View | None:
        """The memory of all blocks, block b at b * page_bytes; None where the host cannot address it."""
        return self.decoder.memory if isinstance(self.decoder, Movable) else None

    def take_wants(self) -> list[Want]:
        """The wants of requests that were just submitted, which the next step would report: whoever brings pages need
        not wait for it."""
        if self._fetches is None:
            return []
        wants, self._fetches.wants = self._fetches.wants, []
        return wants

    def populate(self, request: str, attempt: int, num_pages: int, load: Load) -> None:
        """Bring the next `num_pages` pages of a `Want`, behind those of earlier calls for it.

        Blocks are taken for them, in the order of admission, as soon as there is room; then `load` is called in the RTC
        thread with the memory of as many pages, uint8 [page_bytes] each, to fill; it returns how many of them, from the
        first on, hold what they should. It is called exactly once in any case: with none if the request does not wait
        (any more), or others bring the same pages. When all pages of the want have been handed in, or nothing more is
        to come (`ready`), and all have landed, the request goes on.
        """
        self._is_stuck = False
        assert self._fetches is not None, "nothing was wanted"
        self._fetches.populate(request, attempt, num_pages, load)

    def ready(self, request: str, attempt: int) -> None:
        """Nothing more will come for a `Want`: its request goes on once what is being loaded has landed. What still
        waits for room is given up. Ignored if the request does not wait (any more)."""
        self._is_stuck = False
        if self._fetches is not None:
            self._fetches.ready(request, attempt)

    def copy_out(self, hashes: Iterable[bytes], save: Save) -> None:
        """Have `save` called once in the RTC thread with (hash, memory) of those of these pages that are here and not
        being copied already, maybe none; it returns the hashes of those that the arena has now."""
        assert self._executor is not None, "its blocks cannot be moved"
        self._is_stuck = False
        pages = self._rtc.copy(hashes)

        def copied(saved: list[bytes]) -> None:
            stored = set(saved)
            for page_hash, _ in pages:
                self._rtc.copied(page_hash, page_hash in stored)

        self._executor.save(pages, save, copied)

    def lease(self, hashes: list[bytes], owner: str, ttl_s: float) -> Lease | None:
        """Hold the longest prefix of this chain of pages that is here, for `owner` to read (`Lease.blocks`), until
        `release`, at most for `ttl_s`, and no longer than there is room. None if nothing is here, or too much leased.
        """
        return self._rtc.lease(hashes, owner, self._clock() + ttl_s) if self.movable else None

    def leased(self, lease: str) -> Lease | None:
        """A lease, if its pages are still held and have been all the time."""
        return self._rtc.leased(lease)

    def release(self, lease: str) -> bool:
        """End a lease; whether its pages have been held until now."""
        self._is_stuck = False
        return self._rtc.release(lease)

    def drop(self, keep: str) -> None:
        """A named cache has ended (`Request.keep.id`): its pages may be evicted. Unknown ones are ignored."""
        self._is_stuck = False
        self._rtc.drop(keep)

    # ------------------------------------------------------------------------------------------------ for the engine

    @property
    def _has_moved(self) -> bool:
        """Whether `_take_moved` has something to do."""
        return self._executor is not None and self._executor.has_work

    def _take_moved(self) -> bool:
        """Apply what has moved, and let move what can; whether a step may be launched ahead of those on their way."""
        executor, fetches = self._executor, self._fetches
        if executor is None or fetches is None:
            return True
        if executor.has_work:
            executor.apply(is_quiet=not self._launches)
        fetches.advance()
        return not (executor.wants_quiet and self._launches)

    def _report_pages(self, output: StepOutput) -> None:
        """What is new about pages."""
        bequests, fetches, executor = self._bequests, self._fetches, self._executor
        output.stored, output.removed = self._rtc.drain_events()
        if bequests.handed or bequests.kept:
            output.prefilled, output.kept = bequests.handed, bequests.kept
            bequests.handed, bequests.kept = [], []
        if fetches is not None and fetches.wants:
            output.wants, fetches.wants = fetches.wants, []
        if executor is not None and executor.errors and output.error is None:
            output.error = executor.errors.pop(0)

    def _close(self) -> None:
        """No step is on its way: let the bytes on their way come to their end."""
        if self._executor is not None and self._fetches is not None:
            self._fetches.close()
            self._executor.close()
