"""Who leads: a row in a table that one holder keeps renewing and everybody else watches.

A row that has not changed for its time to live, by the watcher's own clock, is free, and so is one that its holder gave
back. It is taken by compare and set, with a term above every one that was ever seen; whoever is told what to do refuses
a lower term than it knows. A leader stops at half the time to live after it *sent* its last good renewal, long before
anybody else may start. No clock is compared with another one's. This module must not know what is led.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NoReturn

from shared.bus import Bus, Table
from shared.errors import DeepFlowError
from shared.log import Logger
from shared.scaling_messages import LeaseEntry
from shared.table import heed_cancellation

_TABLE: Final = "leases"
_ROUNDS: Final = 6  # renewals, and looks of those who wait, within the time to live


@dataclass(frozen=True, slots=True)
class Write:
    """A row to be put in place of the one at `revision` (0: of none)."""

    entry: LeaseEntry
    revision: int


class Claim:
    """One candidate's view of the lease. Pure: clocks are passed in, and the caller reads and writes the row."""

    def __init__(self, holder: str, ttl_s: float) -> None:
        self.term = 0  # of the lease that is ours; 0: it is not
        self.highest = 0  # term that was ever seen
        self.is_doubtful = True  # the row must be looked at before it can be written
        self._holder = holder
        self._ttl_s = ttl_s
        self._row: LeaseEntry | None = None
        self._revision = 0
        self._since = 0.0  # when the row was first seen as it is
        self._sent = 0.0  # when the last good renewal was

    @property
    def holder(self) -> str:
        """Who holds the lease, as far as one knows; "" if nobody does."""
        return self._row.holder if self._row is not None else ""

    def holds(self, now: float) -> bool:
        """Whether one may act as the leader."""
        return self.term > 0 and now < self._sent + self._ttl_s / 2

    def saw(self, found: tuple[LeaseEntry, int] | None, now: float) -> None:
        """The row as it is, with its revision."""
        self.is_doubtful = False
        row, revision = found if found is not None else (None, 0)
        if row != self._row:
            self._since = now
        self._row, self._revision = row, revision
        if row is not None:
            self.highest = max(self.highest, row.term)
        # Ours it is also if a write of ours was heard, but not answered; not if somebody has acted above it.
        is_ours = row is not None and row.holder == self._holder and row.term == self.highest
        self.term = self.highest if is_ours else 0

    def next(self, now: float, unix_ms: int) -> Write | None:
        """What to write now: a renewal, or the taking of what is free. None: nothing."""
        row = self._row
        if row is not None and self.term:
            return Write(replace(row, beat=row.beat + 1), self._revision)
        if row is not None and row.holder and now - self._since < row.ttl_ms / 1000:
            return None
        entry = LeaseEntry(
            holder=self._holder,
            # Above all others even where the store was lost and nobody remembers them.
            term=max(self.highest + 1, unix_ms),
            beat=0,
            ttl_ms=round(self._ttl_s * 1000),
        )
        return Write(entry, self._revision)

    def giving_back(self) -> Write | None:
        """What to write when one leaves: nobody needs to wait."""
        if self._row is None or not self.term:
            return None
        return Write(replace(self._row, holder="", beat=self._row.beat + 1), self._revision)

    def wrote(self, write: Write, revision: int | None, sent: float) -> None:
        """What came of a write that was sent then; None: somebody was faster, so look."""
        if revision is None:
            self.is_doubtful = True
            return
        self._row, self._revision, self._since = write.entry, revision, sent
        self.highest = max(self.highest, write.entry.term)
        self.term = write.entry.term if write.entry.holder else 0
        self._sent = sent

    def outranked(self, term: int) -> None:
        """Somebody acts under that term: if it is above ours, ours is over, whatever the row says."""
        self.highest = max(self.highest, term)
        if self.term and term > self.term:
            self.term = 0
            self.is_doubtful = True


class Lease:
    """The lease `name`, wanted by `holder` for as long as `run` runs. `changed` is called when it comes or goes."""

    def __init__(
        self,
        bus: Bus,
        name: str,
        holder: str,
        log: Logger,
        *,
        ttl_s: float,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._name = name
        self._log = log
        self._ttl_s = ttl_s
        self._changed = changed
        self._clock = clock
        self._claim = Claim(holder, ttl_s)
        self._table: Table | None = None
        self._is_leaving = False
        self._writing = asyncio.Lock()

    @property
    def term(self) -> int:
        """Under which one may act at this moment; 0: one may not."""
        return self._claim.term if self._claim.holds(self._clock()) else 0

    @property
    def holder(self) -> str:
        """Who leads, as far as one knows."""
        return self._claim.holder

    def outranked(self, term: int) -> None:
        """Somebody acts under that term."""
        before = self._claim.term
        self._claim.outranked(term)
        if before and not self._claim.term:
            self._log.warning("lease_outranked", lease=self._name, term=before, by=term)
            self._changed()

    async def run(self) -> NoReturn:
        """Renew the lease, or wait for it, for ever."""
        while True:
            before = self._claim.term
            try:
                # An answer that comes later than this is of no use.
                async with self._writing, asyncio.timeout(self._ttl_s / 2):
                    await self._round()
            except (DeepFlowError, TimeoutError) as error:
                self._log.warning("lease_unreachable", lease=self._name, error=str(error))
                self._claim.is_doubtful = True  # the write may have been heard
                self._table = None  # and the store may be another one
            if self._claim.term != before:
                event = "lease_taken" if self._claim.term else "lease_lost"
                self._log.info(event, lease=self._name, term=self._claim.term or before)
                self._changed()
            heed_cancellation()
            await asyncio.sleep(self._ttl_s / _ROUNDS)

    async def _round(self) -> None:
        if self._is_leaving:
            return
        if self._table is None:
            self._table = await self._bus.table(_TABLE)
        if self._claim.is_doubtful or not self._claim.term:
            found = await self._table.look(self._name, LeaseEntry)
            self._claim.saw(found, self._clock())
        write = self._claim.next(self._clock(), int(time.time() * 1000))
        if write is not None:
            await self._write(self._table, write)

    async def _write(self, table: Table, write: Write) -> None:
        sent = self._clock()
        revision = await table.replace(self._name, write.entry, write.revision)
        self._claim.wrote(write, revision, sent)

    async def leave(self) -> None:
        """Give the lease back, and want it no more. Raises Unavailable: then it runs out."""
        self._is_leaving = True
        async with self._writing:
            write = self._claim.giving_back()
            self._claim.term = 0
            if write is not None and self._table is not None:
                await self._write(self._table, write)
