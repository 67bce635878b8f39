"""One node of a broadcast: reads a region from its source, and lets others read what has come so far.

Nodes in a chain or tree, each reading from the one before, have all of it after hardly more time than one transfer
takes: chunks are passed on as they come, whoever the slowest is. A source that dies, stops or falls behind is left for
the next one, and reading goes on where it was. It must not know who arranged the nodes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from shared.distflow.faults import Fault, LinkError, TransferError
from shared.distflow.link import Link
from shared.distflow.memory import Memory
from shared.distflow.reader import Run
from shared.distflow.region import Region
from shared.distflow.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Relayed:
    """One node of a broadcast: `region` may be read by others at once, `ticket` is done when all has come."""

    region: Region
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Patience:
    """When a source is left: it brought less than `floor_bytes_s` (and at least one chunk) during `stall_s`, and did
    not say either that it waits itself."""

    stall_s: float = 1.0
    floor_bytes_s: float = 0.0


class Node:
    """Fills `into`, in a thread of its own. `advance(n)` is called as the first `n` bytes are there, `fail()` once no
    more will come; the ticket ends after them."""

    def __init__(
        self,
        sources: Iterable[tuple[Link, Region]],
        into: memoryview | Memory,
        ticket: Ticket,
        patience: Patience,
        advance: Callable[[int], None],
        fail: Callable[[], None],
    ) -> None:
        self._sources = sources
        self._into = into
        self._ticket: Final = ticket
        self._patience = patience
        self._advance = advance
        self._fail = fail
        self._num_bytes = 0  # that are there
        self._thread = threading.Thread(target=self._run, name="distflow-relay", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Until it has ended."""
        self._thread.join()

    def _run(self) -> None:
        error: TransferError | None = TransferError(Fault.UNREACHABLE, "the relay has no source")
        try:
            for link, region in self._sources:
                error = self._read_from(link, region)
                if error is None:
                    break
                _ = self._ticket.remaining_s
        except TransferError as fault:
            error = fault
        except Exception as cause:  # of whoever draws up the sources
            error = TransferError(Fault.FAILED, f"{type(cause).__name__}: {cause}")
        if error is not None:
            self._fail()
        self._ticket.part_done(error)

    def _read_from(self, link: Link, region: Region) -> TransferError | None:
        """Go on reading from here; why it failed, if it did."""
        if region.num_bytes != self._ticket.num_bytes:
            return TransferError(Fault.OUT_OF_BOUNDS, "the sources are not of one size")
        left = region.num_bytes - self._num_bytes
        leg = _Leg(self._ticket, left, self._patience, self._num_bytes, self._landed)
        run = Run(region.id, region.generation, self._num_bytes, left, self._into, self._num_bytes)
        try:
            link.submit(leg, [run], leg)
            leg.wait()
        except LinkError as error:
            return TransferError(error.fault, error.message)
        except TransferError as error:
            return error
        return None

    def _landed(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._advance(num_bytes)


class _Leg(Ticket):
    """The transfer from one source. Its deadline moves on with what comes, up to that of the whole."""

    def __init__(
        self,
        whole: Ticket,
        num_bytes: int,
        patience: Patience,
        start: int,
        landed: Callable[[int], None],
    ) -> None:
        super().__init__(num_bytes, whole.deadline - time.monotonic())
        self._whole = whole
        self._patience = patience
        self._start = start
        self._on_landed = landed
        self._window_ends = time.monotonic() + patience.stall_s
        self._window_bytes = self._num_landed = 0

    @property
    def remaining_s(self) -> float:
        """Until the source has to have brought something, or the whole has to be done."""
        whole_s, now = self._whole.remaining_s, time.monotonic()
        if now < self._window_ends:
            return min(self._window_ends - now, whole_s)
        if self._window_bytes <= self._patience.stall_s * self._patience.floor_bytes_s:
            raise TransferError(Fault.DEADLINE, "the source has stalled")
        self._begin_window()
        return min(self._patience.stall_s, whole_s)

    def landed(self, num_bytes: int) -> None:
        """It brings something."""
        self._window_bytes += num_bytes - self._num_landed
        self._num_landed = num_bytes
        self._on_landed(self._start + num_bytes)

    def waiting(self) -> None:
        """It cannot."""
        self._begin_window()

    def _begin_window(self) -> None:
        self._window_ends = time.monotonic() + self._patience.stall_s
        self._window_bytes = 0
