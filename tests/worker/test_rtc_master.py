"""The RTC master against a naive model: the eight calls, evictions, leases, expiries and named caches, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.worker.flowserve.rtc.master import KEPT_SHARE, LEASED_SHARE, RtcMaster
from services.worker.flowserve.rtc.promise import State, Ticket

paths = st.text("ab", min_size=1, max_size=4)  # a page is named by its path from the root
owners = st.sampled_from(["p", "q"])


def chain(path: str) -> list[bytes]:
    return [path[: end + 1].encode() for end in range(len(path))]


def before(page: bytes) -> bytes | None:
    return page[:-1] or None


@dataclass(eq=False)
class Fetch:
    """A ticket as the model sees it."""

    ticket: Ticket
    pages: list[bytes]
    own: dict[bytes, int]
    awaited: set[bytes]
    held: list[int]
    is_landed: bool
    is_closed: bool = False


@dataclass(eq=False)
class Promise:
    """A lease or a named cache as the model sees it: `pin` is the last block it holds."""

    pages: list[bytes]
    until: int
    pin: int | None


@dataclass
class Model:
    """Who holds what, without counters: everything is computed from scratch whenever it is asked for."""

    num_blocks: int
    index: dict[bytes, int] = field(default_factory=dict)
    tables: list[list[int]] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    copies: dict[bytes, int] = field(default_factory=dict)
    leases: dict[str, Promise] = field(default_factory=dict)
    kept: dict[str, Promise] = field(default_factory=dict)
    in_arena: set[bytes] = field(default_factory=set)

    def live(self) -> set[int]:
        return {block for table in self.tables for block in table}

    def moving(self) -> set[int]:
        coming = {b for fetch in self.fetches if not fetch.is_landed for b in fetch.own.values()}
        return coming | set(self.copies.values())

    def held(self) -> set[int]:
        """With all that is before something held."""
        held = self.live() | self.moving()
        held |= {block for fetch in self.fetches for block in fetch.held}
        for promise in (*self.leases.values(), *self.kept.values()):
            held |= set() if promise.pin is None else {promise.pin}
        for page, block in self.index.items():
            if block in held:
                held |= {self.index[p] for p in chain(page.decode())}
        return held

    def cached(self) -> set[bytes]:
        held = self.held()
        return {page for page, block in self.index.items() if block not in held}

    @property
    def num_available(self) -> int:
        return self.num_blocks - len(self.held())

    def ledger(self) -> dict[str, int]:
        live, moving, held = self.live(), self.moving(), self.held()
        cached = len(self.cached())
        return {
            "total": self.num_blocks,
            "live": len(live),
            "cached": cached,
            "leased": len(held - live - moving),
            "moving": len(moving - live),
            "free": self.num_blocks - len(held) - cached,
        }

    def prefix(self, pages: Iterable[bytes]) -> list[bytes]:
        found: list[bytes] = []
        for page in pages:
            if page not in self.index:
                break
            found.append(page)
        return found

    def arriving(self) -> dict[bytes, Fetch]:
        return {page: f for f in self.fetches if not f.is_landed for page in f.own}

    def make_room(self, num_blocks: int, firm: bool) -> None:
        """Give up promises, cheapest first, while there is too little room; none if there are too few."""
        if num_blocks > self.num_blocks - len(self.live() | self.moving()):
            return
        leases = sorted(self.leases, key=lambda name: self.leases[name].until)
        cheap = [x for x in leases if set(self.leases[x].pages) <= self.in_arena]
        for name in cheap + [x for x in leases if x not in cheap and firm]:
            if num_blocks > self.num_available:
                del self.leases[name]
        for fetch in self.fetches:
            if firm and num_blocks > self.num_available:
                fetch.held.clear()
        for kept in sorted(self.kept.values(), key=lambda one: one.until):
            if firm and num_blocks > self.num_available:
                kept.pin = None

    def num_pinned(self, promises: Iterable[Promise]) -> int:
        return sum(len(one.pages) for one in promises if one.pin is not None)


class RtcMachine(RuleBasedStateMachine):
    """Each rule is one call, with what the model expects of it."""

    @initialize(num_blocks=st.integers(1, 10))
    def start(self, num_blocks: int) -> None:
        self.rtc = RtcMaster(num_blocks)
        self.model = Model(num_blocks)
        self.listener: set[bytes] = set()
        self.now = 0
        self.num_pinned: dict[int, int] = {}  # by the id of what is kept

    # ------------------------------------------------------------------------------------------------ live sequences

    @rule(count=st.integers(0, 6), firm=st.booleans())
    def alloc(self, count: int, firm: bool) -> None:
        model = self.model
        model.make_room(count, firm)
        is_possible = count <= model.num_available
        blocks = self.rtc.alloc_blocks(count, firm=firm)
        assert (blocks is not None) == is_possible
        if blocks is not None:
            self.taken(blocks)
            model.tables.append(blocks)

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data(), firm=st.booleans())
    def append(self, data: st.DataObject, firm: bool) -> None:
        model = self.model
        table = data.draw(st.sampled_from(model.tables))
        model.make_room(1, firm)
        is_possible = model.num_available > 0
        held = model.held()
        assert self.rtc.append_block(table, firm=firm) == is_possible
        if is_possible:
            block = table.pop()
            assert block not in held
            self.taken([block])
            table.append(block)

    def taken(self, blocks: list[int]) -> None:
        """Blocks were handed out: they were held by nobody, and no more was evicted than had to be."""
        model = self.model
        num_free, cached = model.ledger()["free"], model.cached()
        assert not set(blocks) & model.held()
        assert len(set(blocks)) == len(blocks)
        evicted = model.index.keys() - set(self.rtc.index_snapshot())
        assert evicted <= cached
        assert len(evicted) == max(len(blocks) - num_free, 0)
        for page in evicted:
            del model.index[page]
        model.in_arena -= evicted

    @rule(path=paths)
    def match(self, path: str) -> None:
        expected = [self.model.index[page] for page in self.model.prefix(chain(path))]
        blocks = self.rtc.match_by_prefix_token(chain(path))
        assert blocks == expected
        self.model.tables.append(blocks)

    @rule(name=owners)
    def match_by_id(self, name: str) -> None:
        kept = self.model.kept.get(name)
        pages = [] if kept is None else self.model.prefix(kept.pages)
        blocks = self.rtc.match_by_id(name)
        assert blocks == [self.model.index[page] for page in pages]
        self.model.tables.append(blocks)

    @precondition(lambda self: self.model.live())
    @rule(data=st.data(), path=paths)
    def store(self, data: st.DataObject, path: str) -> None:
        """Pages of a path, into blocks of the tables, as far as there are any."""
        model = self.model
        for page in chain(path):
            block = data.draw(st.sampled_from(sorted(model.live())))
            self.rtc.store(block, page, before(page))
            is_found = before(page) is None or before(page) in model.index
            if is_found and page not in model.index and block not in model.index.values():
                model.index[page] = block

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        tables = self.model.tables
        self.rtc.free(tables.pop(data.draw(st.integers(0, len(tables) - 1))))

    @rule(path=paths)
    def forget(self, path: str) -> None:
        model, page = self.model, path.encode()
        self.rtc.forget(page)
        if not any(before(other) == page for other in model.index):
            block = model.index.pop(page, None)
            model.in_arena.discard(page)
            if block is not None:
                model.leases = {n: one for n, one in model.leases.items() if one.pin != block}

    # ---------------------------------------------------------------------------------------------------- moving

    @rule(path=paths, skip=st.integers(0, 3), spare=st.integers(0, 2))
    def populate(self, path: str, skip: int, spare: int) -> None:
        model = self.model
        pages = chain(path)[skip:]
        start = chain(path)[skip - 1] if 0 < skip <= len(path) else None
        arriving = model.arriving()
        is_reachable = start is None or start in model.index or start in arriving
        missing = [p for p in pages if p not in model.index and p not in arriving]
        if not is_reachable:
            missing = []
        here = [page for page in (start or b"", *pages) if page in model.index]
        fetch = Fetch(
            ticket=Ticket(hashes=[], before=None),
            pages=pages,
            own={},
            awaited={p for p in pages if p in arriving},
            held=[model.index[page] for page in here[-1:]],
            is_landed=not missing,
        )
        model.fetches.append(fetch)
        if missing:
            model.make_room(len(missing) + spare, firm=False)
        is_possible = not missing or len(missing) + spare <= model.num_available
        ticket = self.rtc.populate(pages, start, spare=spare)
        assert (ticket is not None) == is_possible
        if ticket is None:
            model.fetches.remove(fetch)
            return
        fetch.ticket = ticket
        assert [pages[number] for number in ticket.own] == missing
        self.taken(ticket.blocks)
        fetch.own = dict(zip(missing, ticket.blocks, strict=True))

    @precondition(lambda self: self.model.moving())
    @rule(data=st.data(), num_ok=st.integers(0, 5))
    def land(self, data: st.DataObject, num_ok: int) -> None:
        model = self.model
        under_way = [fetch for fetch in model.fetches if not fetch.is_landed]
        if not under_way:
            return
        fetch = data.draw(st.sampled_from(under_way))
        self.rtc.landed(fetch.ticket, num_ok)
        fetch.is_landed = True
        for nth, (page, block) in enumerate(fetch.own.items()):
            is_found = before(page) is None or before(page) in model.index
            if nth < num_ok and is_found and page not in model.index:
                model.index[page] = block
            waiting = [other for other in model.fetches if page in other.awaited]
            for other in waiting:
                other.awaited.remove(page)
            for other in waiting + [fetch] * (not fetch.is_closed):
                if page in model.index:
                    other.held.append(model.index[page])
        if fetch.is_closed:
            model.fetches.remove(fetch)

    @precondition(lambda self: self.model.fetches)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        """The request behind a ticket was cancelled, or has found its pages."""
        fetch = data.draw(st.sampled_from(self.model.fetches))
        self.rtc.close(fetch.ticket)
        fetch.is_closed = True
        fetch.awaited.clear()
        fetch.held.clear()
        if fetch.is_landed:
            self.model.fetches.remove(fetch)

    @rule(some=st.lists(paths, max_size=3))
    def copy(self, some: list[str]) -> None:
        model, pages = self.model, [path.encode() for path in some]
        due = {p: model.index[p] for p in pages if p in model.index and p not in model.copies}
        assert self.rtc.copy(pages) == list(due.items())
        model.copies |= due

    @precondition(lambda self: self.model.copies)
    @rule(data=st.data(), stored=st.booleans())
    def copied(self, data: st.DataObject, stored: bool) -> None:
        page = data.draw(st.sampled_from(list(self.model.copies)))
        self.rtc.copied(page, stored)
        del self.model.copies[page]
        if stored and page in self.model.index:
            self.model.in_arena.add(page)

    # -------------------------------------------------------------------------------------------------- promises

    @rule(path=paths, owner=owners, ttl=st.integers(1, 4))
    def lease(self, path: str, owner: str, ttl: int) -> None:
        model, until = self.model, self.now + ttl
        pages = model.prefix(chain(path))
        num_leased = sum(len(one.pages) for one in model.leases.values())
        fits = 0 < len(pages) <= model.num_blocks // LEASED_SHARE - num_leased
        lease = self.rtc.lease(chain(path), owner, until)
        assert (lease is not None) == fits
        if lease is not None:
            blocks = [model.index[page] for page in pages]
            assert (lease.hashes, lease.blocks, lease.owner) == (pages, blocks, owner)
            assert lease.id not in model.leases
            model.leases[lease.id] = Promise(pages, until, blocks[-1])

    @precondition(lambda self: self.model.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(list(self.model.leases)))
        assert self.rtc.holds(lease)
        assert self.rtc.release(lease)
        del self.model.leases[lease]
        assert not self.rtc.release(lease)

    @rule(name=owners, path=paths, ttl=st.integers(1, 4))
    def keep(self, name: str, path: str, ttl: int) -> None:
        model = self.model
        model.kept.pop(name, None)
        room = model.num_blocks // KEPT_SHARE - sum(
            len(self.pinned(k)) for k in model.kept.values()
        )
        pages = model.prefix(chain(path))[: max(room, 0)]
        self.rtc.keep(name, chain(path), self.now + ttl)
        kept = Promise(chain(path), self.now + ttl, model.index[pages[-1]] if pages else None)
        model.kept[name] = kept
        self.num_pinned[id(kept)] = len(pages)

    def pinned(self, kept: Promise) -> list[bytes]:
        return kept.pages[: self.num_pinned[id(kept)]] if kept.pin is not None else []

    @rule(name=owners)
    def drop(self, name: str) -> None:
        self.rtc.drop(name)
        self.model.kept.pop(name, None)

    @rule(seconds=st.integers(0, 2))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        self.rtc.expire(self.now)
        model = self.model
        model.leases = {n: one for n, one in model.leases.items() if one.until > self.now}
        model.kept = {n: one for n, one in model.kept.items() if one.until > self.now}

    # ------------------------------------------------------------------------------------------------------ always

    @rule()
    def drain(self) -> None:
        stored, removed = self.rtc.drain_events()
        self.listener = (self.listener - set(removed)) | set(stored)
        assert self.listener == self.model.index.keys()

    @invariant()
    def balanced(self) -> None:
        model, rtc = self.model, self.rtc
        rtc.check(model.tables)
        ledger = rtc.ledger()
        assert ledger == model.ledger()
        parts = ("live", "cached", "leased", "moving", "free")
        assert ledger["total"] == sum(ledger[part] for part in parts)
        assert rtc.num_available == model.num_available
        assert set(rtc.index_snapshot()) == model.index.keys()
        assert all(before(p) is None or before(p) in model.index for p in model.index)
        for lease in model.leases:
            assert rtc.holds(lease)
            leased = rtc.leased(lease)
            assert leased is not None
            assert leased.blocks == [model.index[page] for page in leased.hashes]
        assert len(rtc._leases) == len(model.leases)
        for fetch in model.fetches:
            if not fetch.is_closed:
                assert rtc.query_populate(fetch.ticket) is self.state_of(fetch)

    def state_of(self, fetch: Fetch) -> State:
        if not fetch.is_landed or fetch.awaited:
            return State.PENDING
        return State.DONE if set(fetch.pages) <= self.model.index.keys() else State.FAILED


RtcMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestRtc = RtcMachine.TestCase
