"""The RTC master of a TE: allocation and movement of KV blocks, decided in one place (arXiv 2501.14417, section 3).

The calls of the paper's Table 1 keep their names, in snake case: `match_by_prefix_token`, `match_by_id`, `populate`,
`query_populate`, `alloc_blocks`, `append_block`, `copy`, `free`. This module decides and keeps the books; `executor.py`
moves the bytes. It must not know tensors, threads, the bus or the clock: times are handed in.

A page is stable (in the index), moving in (named by a ticket, not yet in the index: a match ends before it) or moving
out (in the index, being copied to the host's arena). Promises to others, the leases, tickets and named caches, save
work and never stop any: where a block is needed and there is no other room they are given up, those first whose pages
the arena has, and their owners learn it. Only what is moving at that moment cannot be given up, and that ends by
itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from math import inf

from services.worker.flowserve.rtc.pool import NONE, BlockPool
from services.worker.flowserve.rtc.promise import Arrival, Kept, Lease, State, Ticket

KEPT_SHARE = 4  # named caches hold at most one block in so many
LEASED_SHARE = 2  # and leases
NAMED_PAGES = 64  # per block: pages that named caches may have between them


class RtcMaster(BlockPool):
    """A `BlockPool` whose pages come and go. Every call costs O(pages named in it), and finding room O(promises)."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self._tickets: dict[Ticket, None] = {}  # not closed, or still pending
        self._arriving: dict[bytes, Arrival] = {}
        self._copying: dict[bytes, int] = {}
        self._leases: dict[str, Lease] = {}
        self._num_leased = 0  # pages, each counted in every lease
        self._kept: dict[str, Kept] = {}
        self._num_kept = 0  # pinned pages, each counted in every cache
        self._num_named = 0
        self._in_arena = bytearray(num_blocks)  # what is known of each block's page
        self._numbers = count(1)
        self._next_end = inf  # no lease and no named cache ends before
        self.num_broken = 0  # leases given up before their time

    @property
    def num_moving(self) -> int:
        """Blocks that cannot be had, because bytes move to or from them, until that ends by itself."""
        return self._num_moving

    def match_by_id(self, name: str) -> list[int]:
        """The blocks of the pages of a named cache, as `match_by_prefix_token`."""
        kept = self._kept.get(name)
        return [] if kept is None else self.match_by_prefix_token(kept.hashes)

    # ------------------------------------------------------------------------------------------------- moving in

    def populate(
        self, hashes: Sequence[bytes], before: bytes | None, *, spare: int = 0
    ) -> Ticket | None:
        """A ticket for these consecutive pages behind the page `before` (None: they begin a chain): blocks to fill for
        those that are neither here nor moving in already. It waits for the latter, and holds what is here.

        None: `spare` more blocks than it takes are not available now. Pages without the one before are not brought.
        """
        index, arriving = self._index, self._arriving
        is_reachable = before is None or before in index or before in arriving
        missing = [
            n for n, h in enumerate(hashes) if is_reachable and h not in index and h not in arriving
        ]
        ticket = Ticket(hashes=list(hashes), before=before, own=missing, is_landed=not missing)
        here = next((h for h in reversed(hashes) if h in index), before)
        if here is not None:
            self._add_hold(ticket, here)  # before anything is evicted
        if missing:
            num_blocks = len(missing) + spare
            if num_blocks > self.num_available:
                self._make_room(num_blocks, firm=False)
            if num_blocks > self.num_available:
                self._let_ticket_go(ticket)
                return None
        for page_hash in hashes:
            if page_hash in arriving:
                arriving[page_hash].waiting.append(ticket)
                ticket.awaited.add(page_hash)
        for number in missing:
            block = self._take()
            self._refs[block] = 1
            self._moving.add(block)
            ticket.blocks.append(block)
            arriving[hashes[number]] = Arrival(ticket=ticket)
        self._num_moving += len(missing)
        self._tickets[ticket] = None
        return ticket

    def _add_hold(self, ticket: Ticket, page_hash: bytes) -> None:
        block = self._index.get(page_hash)
        if block is not None:
            self._hold(block)
            ticket.held.append(block)

    def landed(self, ticket: Ticket, num_ok: int) -> None:
        """The first `num_ok` of the pages that this ticket brings are in their blocks, the others will not come.

        A page without the one before it is given back; one that was computed meanwhile as well.
        """
        assert not ticket.is_landed, "lands once"
        ticket.is_landed = True
        for nth, (number, block) in enumerate(zip(ticket.own, ticket.blocks, strict=True)):
            page_hash = ticket.hashes[number]
            arrival = self._arriving.pop(page_hash)
            self._moving.discard(block)
            self._num_moving -= 1
            if nth < num_ok:
                self.store(block, page_hash, ticket.hashes[number - 1] if number else ticket.before)
            if not ticket.is_closed:
                self._add_hold(ticket, page_hash)
            for other in arrival.waiting:
                other.awaited.discard(page_hash)
                self._add_hold(other, page_hash)
            self._release(block)
        if ticket.is_closed:
            self._tickets.pop(ticket, None)

    def query_populate(self, ticket: Ticket) -> State:
        """How a ticket is getting on."""
        if not ticket.is_landed or ticket.awaited:
            return State.PENDING
        return State.DONE if all(h in self._index for h in ticket.hashes) else State.FAILED

    def close(self, ticket: Ticket) -> None:
        """The ticket is not needed any more. Pages on their way still land, and are then cached like any other."""
        if ticket.is_closed:
            return
        ticket.is_closed = True
        for page_hash in ticket.awaited:
            self._arriving[page_hash].waiting.remove(ticket)
        ticket.awaited.clear()
        self._let_ticket_go(ticket)
        if ticket.is_landed:
            self._tickets.pop(ticket, None)

    def _let_ticket_go(self, ticket: Ticket) -> None:
        held, ticket.held = ticket.held, []
        for block in reversed(held):
            self._release(block)

    def is_arriving(self, page_hash: bytes) -> bool:
        """Whether some ticket brings this page."""
        return page_hash in self._arriving

    # ------------------------------------------------------------------------------------------------ moving out

    def copy(self, hashes: Iterable[bytes]) -> list[tuple[bytes, int]]:
        """Those of these pages that are here and not moving out yet, with their blocks, held until `copied`."""
        pages: list[tuple[bytes, int]] = []
        for page_hash in hashes:
            block = self._index.get(page_hash)
            if block is None or page_hash in self._copying:
                continue
            self._hold(block)
            self._copying[page_hash] = block
            if block not in self._moving:
                self._moving.add(block)
                self._num_moving += not self._tables[block]
            pages.append((page_hash, block))
        return pages

    def copied(self, page_hash: bytes, stored: bool) -> None:
        """A page from `copy` has been read; `stored`: the arena has it now."""
        block = self._copying.pop(page_hash)
        self._moving.discard(block)
        self._num_moving -= not self._tables[block]
        if stored:
            self.stored_in_arena(page_hash)
        self._release(block)

    def stored_in_arena(self, page_hash: bytes) -> None:
        """The arena has this page: what is promised about it is cheap to break."""
        block = self._index.get(page_hash)
        if block is not None:
            self._in_arena[block] = 1

    def _unindex(self, block: int) -> None:
        self._in_arena[block] = 0
        super()._unindex(block)

    # ---------------------------------------------------------------------------------------------------- promises

    def lease(self, hashes: Sequence[bytes], owner: str, until: float) -> Lease | None:
        """Hold the longest prefix of this chain that is here for `owner`; None if there is none, or no room for it:
        leases hold half of the pool at most."""
        num_pages = self.num_present(hashes)
        room = self.num_blocks // LEASED_SHARE - self._num_leased
        if not 0 < num_pages <= room:
            return None
        named = list(hashes[:num_pages])
        blocks = [self._index[page_hash] for page_hash in named]
        lease = Lease(
            id=f"{next(self._numbers)}", owner=owner, until=until, hashes=named, blocks=blocks
        )
        self._hold(blocks[-1])
        self._leases[lease.id] = lease
        self._next_end = min(self._next_end, until)
        self._num_leased += num_pages
        return lease

    def leased(self, lease_id: str) -> Lease | None:
        """A lease, if it still holds."""
        return self._leases.get(lease_id)

    def holds(self, lease_id: str) -> bool:
        """Whether the pages of this lease are still held, and so have been all the time."""
        return lease_id in self._leases

    def release(self, lease_id: str) -> bool:
        """End a lease; whether it held until now."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        self._num_leased -= len(lease.blocks)
        self._release(lease.blocks[-1])
        return True

    def keep(self, name: str, hashes: Sequence[bytes], until: float) -> None:
        """Give this chain a name. As many of its first pages as the share of all named caches allows are held on the
        device; for the others the arena has to do."""
        self.drop(name)
        while self._kept and self._num_named + len(hashes) > NAMED_PAGES * self.num_blocks:
            self.drop(min(self._kept, key=lambda other: self._kept[other].until))
        num_pinned = min(
            self.num_present(hashes), max(self.num_blocks // KEPT_SHARE - self._num_kept, 0)
        )
        pinned = self._index[hashes[num_pinned - 1]] if num_pinned else NONE
        if num_pinned:
            self._hold(pinned)
        self._next_end = min(self._next_end, until)
        self._num_kept += num_pinned
        self._num_named += len(hashes)
        self._kept[name] = Kept(
            hashes=list(hashes), until=until, pinned=pinned, num_pinned=num_pinned
        )

    def drop(self, name: str) -> None:
        """A named cache has ended; its pages are cached like any other."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            self._num_named -= len(kept.hashes)
            self._unpin(kept)

    def expire(self, now: float) -> None:
        """End leases and named caches whose time has come."""
        if now < self._next_end:
            return
        for lease in [lease for lease in self._leases.values() if lease.until <= now]:
            self.release(lease.id)
        for name in [name for name, kept in self._kept.items() if kept.until <= now]:
            self.drop(name)
        ends = [lease.until for lease in self._leases.values()]
        ends += [kept.until for kept in self._kept.values()]
        self._next_end = min(ends, default=inf)

    def forget(self, page_hash: bytes) -> None:
        """As `BlockPool`; a lease that ends with this page is broken."""
        block = self._index.get(page_hash)
        if block is not None and not self._children[block]:
            for lease in [one for one in self._leases.values() if one.blocks[-1] == block]:
                self._break(lease)
        super().forget(page_hash)

    def _unpin(self, kept: Kept) -> None:
        if kept.num_pinned:
            self._num_kept -= kept.num_pinned
            self._release(kept.pinned)
            kept.pinned, kept.num_pinned = NONE, 0

    def _make_room(self, num_blocks: int, firm: bool) -> None:
        """Give up promises until `num_blocks` are available: leases whose pages the arena has, and if `firm` all
        others: leases before tickets before named caches, each in the order of their time. None, where even all of
        them were not enough."""
        if num_blocks > self.num_blocks - self._num_live - self._num_moving:
            return
        for lease in sorted(self._leases.values(), key=lambda lease: lease.until):
            if num_blocks <= self.num_available:
                return
            if all(self._in_arena[block] for block in lease.blocks):
                self._break(lease)
        if not firm:
            return
        for lease in sorted(self._leases.values(), key=lambda lease: lease.until):
            if num_blocks <= self.num_available:
                return
            self._break(lease)
        for ticket in self._tickets:
            if num_blocks <= self.num_available:
                return
            self._let_ticket_go(ticket)
        for kept in sorted(self._kept.values(), key=lambda kept: kept.until):
            if num_blocks <= self.num_available:
                return
            self._unpin(kept)

    def _break(self, lease: Lease) -> None:
        self.release(lease.id)
        self.num_broken += 1

    # ------------------------------------------------------------------------------------------------------ ledger

    def check(self, tables: Iterable[Sequence[int]], holds: Iterable[int] = ()) -> None:
        """As `BlockPool`, with what tickets, copies, leases and named caches hold."""
        held = [*holds, *self._copying.values()]
        for ticket in self._tickets:
            held += ticket.held
            if not ticket.is_landed:
                held += ticket.blocks
        held += [lease.blocks[-1] for lease in self._leases.values()]
        held += [kept.pinned for kept in self._kept.values() if kept.num_pinned]
        super().check(tables, held)
        arriving = {a.ticket for a in self._arriving.values()}
        if arriving != {ticket for ticket in self._tickets if not ticket.is_landed}:
            raise AssertionError("a ticket and the pages it brings disagree")
        coming = {block for ticket in arriving for block in ticket.blocks}
        if self._moving != coming | set(self._copying.values()):
            raise AssertionError("blocks are moving without anything that moves them")
        if self._num_leased != sum(len(lease.blocks) for lease in self._leases.values()):
            raise AssertionError("leased pages are miscounted")
