"""The lease of who leads: never two at once, terms that only grow, and nobody who waits longer than he must."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.cluster.lease import Claim, Lease, Write
from shared import log
from shared.bus import Bus
from shared.scaling_messages import LeaseEntry
from tests.nats_server import NatsServer
from tests.scheduler.players import eventually

TTL_S = 2.0


def take(claim: Claim, found: tuple[LeaseEntry, int] | None, now: float, unix_ms: int = 1) -> Write:
    """What `claim` writes on seeing `found`, which it must."""
    claim.saw(found, now)
    write = claim.next(now, unix_ms)
    assert write is not None
    return write


def test_a_free_row_is_taken_and_held_for_half_its_time_from_sending() -> None:
    """However late the answer to a renewal comes, its time counts from when it was sent."""
    claim = Claim("a", TTL_S)
    write = take(claim, None, 10.0, unix_ms=77)
    assert (write.entry.holder, write.entry.term, write.revision) == ("a", 77, 0)
    claim.wrote(write, 5, 10.0)  # the answer came at 10.9
    assert claim.holds(10.99)
    assert not claim.holds(11.0)
    renewal = claim.next(10.9, 99)
    assert renewal is not None
    assert (renewal.entry.term, renewal.entry.beat, renewal.revision) == (77, 1, 5)
    claim.wrote(renewal, 6, 10.9)
    assert claim.holds(11.8)


def test_who_watches_takes_over_when_nothing_changed_for_the_holders_time() -> None:
    """By the watcher's own clock, from the last change it saw; under a term above all others, whatever the date."""
    row = LeaseEntry(holder="a", term=500, beat=3, ttl_ms=2000)
    claim = Claim("b", 9.0)
    claim.saw((row, 7), 100.0)
    assert claim.next(101.9, 1) is None
    claim.saw((LeaseEntry(holder="a", term=500, beat=4, ttl_ms=2000), 8), 101.9)
    assert claim.next(103.8, 1) is None
    claim.outranked(600)  # somebody acts under that
    write = claim.next(103.9, 1)
    assert write is not None
    assert (write.entry.holder, write.entry.term, write.revision) == ("b", 601, 8)
    claim.wrote(write, None, 103.9)  # somebody was faster
    assert not claim.holds(103.9)
    assert claim.is_doubtful


def test_what_was_given_back_is_free_at_once() -> None:
    """Nobody waits for one who left, and the one who takes it is above him."""
    leaving = Claim("a", TTL_S)
    leaving.wrote(take(leaving, None, 0.0, unix_ms=9), 1, 0.0)
    gone = leaving.giving_back()
    assert gone is not None
    leaving.wrote(gone, 2, 0.5)
    assert not leaving.holds(0.5)
    assert take(Claim("b", TTL_S), (gone.entry, 2), 0.5).entry.term == 10


def test_one_who_is_outranked_stops_at_once() -> None:
    """Also if the row still says that the lease is its own; it then leads again under a higher term only."""
    claim = Claim("a", TTL_S)
    first = take(claim, None, 0.0, unix_ms=9)
    claim.wrote(first, 1, 0.0)
    claim.outranked(9)
    assert claim.holds(0.1)
    claim.outranked(12)
    assert not claim.holds(0.1)
    claim.saw((first.entry, 1), 0.2)
    assert claim.next(0.3, 1) is None
    write = claim.next(TTL_S, 1)
    assert write is not None
    assert write.entry.term == 13


def test_a_renewal_that_was_heard_and_not_answered_leaves_the_lease_ours() -> None:
    """But its time is that of the last one that was answered."""
    claim = Claim("a", TTL_S)
    claim.wrote(take(claim, None, 0.0), 1, 0.0)
    lost = claim.next(0.5, 1)
    assert lost is not None
    claim.is_doubtful = True
    claim.saw((lost.entry, 2), 0.9)
    assert claim.holds(0.9)
    assert not claim.holds(1.0)
    again = claim.next(1.2, 1)
    assert again is not None
    assert again.revision == 2


@dataclass
class Candidate:
    """One that wants the lease, and the write that it has under way."""

    claim: Claim
    offset: float  # of its clock
    write: Write | None = None
    sent: float = 0.0
    result: list[int | None] = field(default_factory=list)

    def clock(self, now: float) -> float:
        """Its reading."""
        return now + self.offset


class Store:
    """A row that is replaced by compare and set."""

    def __init__(self) -> None:
        self.row: tuple[LeaseEntry, int] | None = None
        self.revision = 0

    def replace(self, write: Write) -> int | None:
        """The new revision; None if the row is another one."""
        if write.revision != (self.row[1] if self.row else 0):
            return None
        self.revision += 1
        self.row = write.entry, self.revision
        return self.revision


STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.booleans(), st.sampled_from([0.0, 0.01, 0.3, 0.9, 2.1])),
    max_size=60,
)


@given(STEPS, st.lists(st.floats(0, 1e6), min_size=3, max_size=3))
@settings(max_examples=100, deadline=None)
def test_never_two_lead_at_once(steps: list[tuple[int, bool, float]], offsets: list[float]) -> None:
    """Whatever the clocks show, and however late writes are heard, answered or given up; and no two ever had the same
    term."""
    store, now, terms = Store(), 0.0, dict[int, str]()
    all_ = [Candidate(Claim(name, TTL_S), off) for name, off in zip("abc", offsets, strict=True)]
    late: list[Write] = []
    for who, is_patient, step_s in steps:
        now += step_s
        one = all_[who]
        if one.result:  # the answer is here
            assert one.write is not None
            one.claim.wrote(one.write, one.result.pop(), one.sent)
            one.write = None
        elif one.write is not None and is_patient:  # it is heard
            one.result.append(store.replace(one.write))
        elif one.write is not None:  # given up; it may be heard later all the same
            late.append(one.write)
            one.write, one.claim.is_doubtful = None, True
        elif late and not is_patient:
            store.replace(late.pop())
        else:
            if one.claim.is_doubtful or not one.claim.term:
                one.claim.saw(store.row, one.clock(now))
            one.write, one.sent = one.claim.next(one.clock(now), 1), one.clock(now)
        leaders = [one for one in all_ if one.claim.holds(one.clock(now))]
        assert len(leaders) <= 1
        for leader in leaders:
            assert terms.setdefault(leader.claim.term, leader.claim.holder) == leader.claim.holder


@asynccontextmanager
async def wanted(bus: Bus, holder: str, *, ttl_s: float = 0.6) -> AsyncIterator[Lease]:
    """A lease that somebody wants; at the end it is not given back."""
    lease = Lease(bus, "x", holder, log.get(), ttl_s=ttl_s, changed=lambda: None)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(lease.run())
        yield lease
        running.cancel()


async def test_one_takes_over_from_one_that_died_or_left(bus: Bus) -> None:
    """Each time under a higher term; one that only watches knows who leads."""
    async with wanted(bus, "c", ttl_s=30.0) as last:
        await eventually(lambda: last.term > 0)
        async with wanted(bus, "b") as second:
            await eventually(lambda: second.holder == "c")
            assert second.term == 0
            first_term = last.term
            await last.leave()
            await eventually(lambda: second.term > first_term)
            second_term = second.term
            async with wanted(bus, "a") as third:
                await eventually(lambda: third.holder == "b")
                await asyncio.sleep(0.7)
                assert (second.term, third.term) == (second_term, 0)
        async with wanted(bus, "d") as fourth:  # "b" died
            await eventually(lambda: fourth.term > second_term)


async def test_a_leader_without_a_bus_stops_and_a_lost_store_keeps_terms_growing(
    bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """The half of its time is enough for it to stop; where the store was lost nobody goes back to an old term."""
    async with wanted(bus, "a") as lease:
        await eventually(lambda: lease.term > 0)
        term = lease.term
        nats.kill()
        await asyncio.sleep(0.35)
        assert lease.term == 0
        shutil.rmtree(tmp_path / "nats" / "js")
        nats.start()
        await eventually(lambda: lease.term > term)
