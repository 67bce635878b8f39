"""A transfer under way, to be waited for by a thread, a poll or an event loop.

It must not know what moves the bytes.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Final

from shared.distflow.faults import Fault, TransferError


class Ticket:
    """One transfer. It is done when all pieces are in their places and proven to be what was asked for; or it has
    failed, and then nothing writes into the destinations any more either.

    In a coroutine: `await asyncio.wrap_future(ticket.future)`.
    """

    def __init__(self, num_bytes: int, timeout_s: float) -> None:
        self.num_bytes: Final = num_bytes
        self.deadline: Final = time.monotonic() + timeout_s
        self.future: Final[Future[int]] = Future()  # of the number of bytes
        self.future.set_running_or_notify_cancel()  # who waits may leave; what ends it is `cancel`
        self._lock = threading.Lock()
        self._num_parts = 1
        self._error: TransferError | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it is done. Raises TransferError; TimeoutError if it is still under way after `timeout_s` (the
        transfer's own deadline goes on beside that)."""
        self.future.result(timeout_s)

    def poll(self) -> bool:
        """Whether it is done. Raises TransferError if it has failed."""
        if not self.future.done():
            return False
        self.future.result()
        return True

    def cancel(self) -> None:
        """Give it up: it fails soon, unless it is done already."""
        self._fail(TransferError(Fault.CANCELLED, "the transfer was cancelled"))

    # ------------------------------------------------------------------------------------- for those who do the work

    @property
    def remaining_s(self) -> float:
        """Seconds until its deadline. Raises TransferError once that has passed, or something else has failed."""
        if self._error is not None:
            raise self._error
        remaining_s = self.deadline - time.monotonic()
        if remaining_s <= 0:
            raise TransferError(Fault.DEADLINE, "the transfer was not done in time")
        return remaining_s

    def add_parts(self, number: int) -> None:
        """So many more calls of `part_done` are to come; one is expected from the beginning."""
        with self._lock:
            self._num_parts += number

    def part_done(self, error: TransferError | None = None) -> None:
        """One part's worker has finished with it and touches no destination from here on; the last one ends it."""
        if error is not None:
            self._fail(error)
        with self._lock:
            self._num_parts -= 1
            if self._num_parts:
                return
        if self._error is None:
            self.future.set_result(self.num_bytes)
        else:
            self.future.set_exception(self._error)

    def _fail(self, error: TransferError) -> None:
        with self._lock:
            if self._error is None and self._num_parts:
                self._error = error
