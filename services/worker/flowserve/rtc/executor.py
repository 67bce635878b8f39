"""The RTC executor: it moves the bytes of blocks, in a thread of its own, one job after the other.

The engine's thread hands in jobs and applies their results between two steps. Where the host can address the blocks
(`Movable.block_view`), a job works on them directly; elsewhere the engine's thread reads and writes them, in small
batches while no step is on its way. This module must not know whose blocks they are, nor why they move.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from services.worker.flowserve.decoder import Movable, View

T = TypeVar("T")
Load: TypeAlias = Callable[[list[View]], int]
Save: TypeAlias = Callable[[list[tuple[bytes, View]]], list[bytes]]

_NOTHING: Final[list[bytes]] = []
BATCH: Final = 16  # blocks read or written by the engine's thread between two steps
MAX_ERRORS: Final = 16  # that wait to be reported


@dataclass(slots=True, eq=False)
class _Job:
    """`run` in the executor's thread, then `done` with its result in the engine's. `error`: what `run` raised."""

    run: Callable[[], Any]
    done: Callable[[Any], None]
    default: Any
    result: Any = None
    error: Exception | None = None


@dataclass(slots=True)
class _Inbox:
    """What the thread knows: not the executor, so that one nobody holds any more ends it."""

    jobs: SimpleQueue[_Job | None] = field(default_factory=SimpleQueue)
    finished: SimpleQueue[_Job] = field(default_factory=SimpleQueue)
    wake: Callable[[], None] | None = None


class RtcExecutor:
    """Moves blocks of `decoder`. Its thread starts with the first job. `wake` is called, in that thread, when a result
    is there to be applied; all else belongs to the engine's thread.

    `errors` are faults of jobs, each of which counts as having moved nothing; for whoever reports them to take. While
    MAX_ERRORS wait, further ones are not told.
    """

    def __init__(self, decoder: Movable, wake: Callable[[], None] | None = None) -> None:
        self.errors: list[Exception] = []
        self._decoder = decoder
        self._inbox = _Inbox(wake=wake)
        self._thread: threading.Thread | None = None
        self._num_under_way = 0
        # What the engine's thread does with blocks that the host cannot address: a batch at each `next`.
        self._passages: deque[Iterator[None]] = deque()
        self._scratch: View | None = None

    def fill(self, blocks: Sequence[int | None], load: Load, done: Callable[[int], None]) -> None:
        """Run `load` over the memory of these blocks (None: nobody wants the page, but it has its place), then `done`
        with what it returns: how many of them, from the first on, are filled. Nobody may use the blocks meanwhile."""
        views = [self._view(block) for block in blocks]
        if all(view is not None for view in views):
            self._start(lambda: load([v for v in views if v is not None]), done, 0)
            return
        data = np.empty((len(blocks), self._decoder.block_bytes), np.uint8)

        def write(num_ok: int) -> None:
            pairs = [(row, block) for row, block in enumerate(blocks[:num_ok]) if block is not None]
            self._passages.append(self._write(pairs, data, num_ok, done))

        self._start(lambda: load(list(data)), write, 0)

    def save(
        self, pages: list[tuple[bytes, int]], save: Save, done: Callable[[list[bytes]], None]
    ) -> None:
        """Run `save` over (hash, memory) of these pages (hash, block), then `done` with the hashes it returns. Nobody
        may write to the blocks meanwhile."""
        views = [self._view(block) for _, block in pages]
        named = [
            (page_hash, v) for (page_hash, _), v in zip(pages, views, strict=True) if v is not None
        ]
        if len(named) == len(pages):
            self._start(lambda: save(named), done, _NOTHING)
        else:
            self._passages.append(self._read(pages, save, done))

    def _view(self, block: int | None) -> View | None:
        if block is not None:
            return self._decoder.block_view(block)
        if self._scratch is None:
            self._scratch = np.empty(self._decoder.block_bytes, np.uint8)
        return self._scratch

    def _write(
        self, pairs: list[tuple[int, int]], data: View, num_ok: int, done: Callable[[int], None]
    ) -> Iterator[None]:
        try:
            for start in range(0, len(pairs), BATCH):
                rows, blocks = zip(*pairs[start : start + BATCH], strict=True)
                self._decoder.write_blocks(blocks, data[list(rows)])
                yield
        except Exception as error:  # the device may have no room for the copy on its way
            self._note(error)
            num_ok = 0
        done(num_ok)

    def _read(
        self, pages: list[tuple[bytes, int]], save: Save, done: Callable[[list[bytes]], None]
    ) -> Iterator[None]:
        read: list[tuple[bytes, View]] = []
        try:
            for start in range(0, len(pages), BATCH):
                batch = pages[start : start + BATCH]
                data = self._decoder.read_blocks([block for _, block in batch])
                read += zip([page_hash for page_hash, _ in batch], data, strict=True)
                yield
        except Exception as error:
            self._note(error)
        self._start(lambda: save(read), done, _NOTHING)

    # ----------------------------------------------------------------------------------------------------- the thread

    def _start(self, run: Callable[[], T], done: Callable[[T], None], default: T) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._inbox,), name="rtc", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._inbox.jobs.put, None)
        self._num_under_way += 1
        self._inbox.jobs.put(_Job(run, done, default))

    @property
    def has_work(self) -> bool:
        """Whether `apply` has something to do."""
        return bool(self._passages) or not self._inbox.finished.empty()

    @property
    def wants_quiet(self) -> bool:
        """Whether it waits for a moment in which no step is on its way."""
        return bool(self._passages)

    def apply(self, *, is_quiet: bool) -> None:
        """Apply results; if no step is on its way, move a batch of blocks that only this thread can."""
        with suppress(Empty):
            while self._num_under_way:
                self._finish(self._inbox.finished.get_nowait())
        if is_quiet and self._passages:
            passage = self._passages.popleft()
            for _ in passage:
                self._passages.appendleft(passage)  # the rest of it, later
                return

    def _finish(self, job: _Job) -> None:
        self._num_under_way -= 1
        if job.error is not None:
            self._note(job.error)
            job.result = job.default
        job.done(job.result)

    def _note(self, error: Exception) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error)

    def close(self) -> None:
        """Finish all jobs, and end the thread. Only while no step is on its way."""
        while self._num_under_way or self._passages:
            if self._num_under_way:
                self._finish(self._inbox.finished.get())
            self.apply(is_quiet=True)
        if self._thread is not None:
            self._inbox.jobs.put(None)
            self._thread.join()


def _work(inbox: _Inbox) -> None:
    while (job := inbox.jobs.get()) is not None:
        try:
            job.result = job.run()
        except Exception as error:
            job.error = error
        inbox.finished.put(job)
        del job  # it knows the executor
        if inbox.wake is not None:
            inbox.wake()
