"""The directory against a naive model: lost, late and repeated events, dumps, deaths, and the budget."""

from __future__ import annotations

import gc
import os
import tracemalloc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.cache.directory import ABSENT, PAGE_BYTES, TIERS, Directory
from shared.block_feed import MAX_WAITING_PAGES
from shared.rtc_messages import BlockEvents, BlocksDump, Holder

ROOMY = 1 << 30
LONG = 10 if os.environ.get("DEEPFLOW_SOAK") else 1


def page(number: int) -> bytes:
    """The hash of a page."""
    return number.to_bytes(16, "big")


def pages(*numbers: int) -> list[bytes]:
    """Hashes."""
    return [page(number) for number in numbers]


def events(
    te: str, seq: int, stored: str = "", removed: str = "", tier: str = "device"
) -> BlockEvents:
    """An event about pages named by single digits."""
    return BlockEvents(
        te=te,
        model="m",
        seq=seq,
        stored=pages(*map(int, stored)),
        removed=pages(*map(int, removed)),
        tier=tier,
    )


def dump(te: str, seq: int, *numbers: int) -> BlocksDump:
    """A whole index."""
    return BlocksDump(te=te, model="m", seq=seq, hashes=pages(*numbers))


def held(directory: Directory, *numbers: int) -> dict[str, int]:
    """Who holds how many of the first pages."""
    return {h.te: h.num_pages for h in directory.match("m", pages(*numbers))}


def test_longest_prefix_first_and_only_of_the_model() -> None:
    """Holders come longest first, a prefix ends at the first missing page, other models do not count."""
    directory = Directory(max_bytes=ROOMY)
    directory.apply(events("short", 1, "124"))
    directory.apply(events("long", 1, "1234"))
    directory.apply(BlockEvents(te="other", model="n", seq=1, stored=pages(1, 2, 3, 4)))
    assert directory.match("m", pages(1, 2, 3, 4, 5)) == [
        Holder(te="long", num_pages=4, tier="device"),
        Holder(te="short", num_pages=2, tier="device"),
    ]
    assert directory.match("m", pages(9)) == []
    assert directory.match("m", []) == []


def test_a_holder_names_its_slowest_tier() -> None:
    """A page counts in its fastest tier, a prefix in the slowest of its pages; a page goes when its last tier goes."""
    directory = Directory(max_bytes=ROOMY)
    directory.apply(events("te", 1, "12"))
    directory.apply(events("te", 2, "123", tier="host"))
    assert directory.match("m", pages(1, 2)) == [Holder(te="te", num_pages=2, tier="device")]
    assert directory.match("m", pages(1, 2, 3)) == [Holder(te="te", num_pages=3, tier="host")]
    directory.apply(events("te", 3, removed="1"))
    assert directory.match("m", pages(1)) == [Holder(te="te", num_pages=1, tier="host")]
    directory.apply(events("te", 4, removed="1", tier="host"))
    assert directory.match("m", pages(1)) == []
    directory.check()


def test_an_arena_holds_pages_of_many_models_and_names_its_host() -> None:
    """A cache service has an index per model, each with its own numbers, and is answered with its host."""
    directory = Directory(max_bytes=ROOMY)
    directory.owns("cache", "h1")
    directory.seen("cache", "m")
    directory.load(BlocksDump(te="cache", model="m", seq=4, hashes=pages(1, 2), tier="host"))
    directory.apply(BlockEvents(te="cache", model="n", seq=1, stored=pages(1), tier="host"))
    assert directory.feeds.unsynced() == []
    assert directory.match("m", pages(1, 2)) == [
        Holder(te="cache", num_pages=2, tier="host", host="h1")
    ]
    assert directory.match("n", pages(1, 2)) == [
        Holder(te="cache", num_pages=1, tier="host", host="h1")
    ]
    assert directory.holders() == {"cache": 3}
    directory.apply(BlockEvents(te="cache", model="n", seq=3, stored=pages(3), tier="host"))
    assert directory.feeds.unsynced() == [("cache", "n")]
    assert directory.remove("cache")
    assert directory.holders() == {}
    directory.check()


def test_a_dump_tells_what_is_on_ssd_only() -> None:
    """Pages of a dump's second list are in the slow tier; the tiers of a chain are told page by page."""
    directory = Directory(max_bytes=ROOMY)
    directory.load(
        BlocksDump(te="c", model="m", seq=1, hashes=pages(1), tier="host", ssd=pages(2, 4))
    )
    host, ssd = TIERS.index("host"), TIERS.index("ssd")
    assert directory.tiers("c", "m", pages(1, 2, 3, 4)) == [host, ssd, ABSENT, ssd]
    assert directory.tiers("d", "m", pages(1)) == [ABSENT]
    assert directory.match("m", pages(1, 2, 3)) == [Holder(te="c", num_pages=2, tier="ssd")]


def test_removed_before_stored() -> None:
    """A page removed and stored in the same step is held."""
    directory = Directory(max_bytes=ROOMY)
    directory.apply(events("te", 1, "1"))
    directory.apply(events("te", 2, "1", removed="1"))
    assert held(directory, 1) == {"te": 1}


def test_a_gap_asks_for_a_dump_and_keeps_the_last_view() -> None:
    """After a lost event the TE is unsynced, its old pages stand, and the dump plus later events give the truth."""
    directory = Directory(max_bytes=ROOMY)
    directory.apply(events("te", 1, "1"))
    assert directory.feeds.unsynced() == []
    directory.apply(events("te", 3, "3"))
    assert directory.feeds.unsynced() == [("te", "m")]
    assert directory.feeds.num_gaps == 1
    assert held(directory, 1) == {"te": 1}
    directory.apply(events("te", 5, "5"))
    directory.load(dump("te", 3, 1, 2, 3))
    assert directory.feeds.unsynced() == [("te", "m")]  # 4 is missing still
    directory.load(dump("te", 4, 1, 2, 3, 4))
    assert directory.feeds.unsynced() == []
    assert held(directory, 1, 2, 3, 4, 5) == {"te": 5}


def test_late_and_repeated_events() -> None:
    """An event out of turn waits for the one before it; repeated and old ones change nothing."""
    directory = Directory(max_bytes=ROOMY)
    directory.apply(events("te", 1, "1"))
    directory.apply(events("te", 3, removed="1"))
    directory.apply(events("te", 2, "2"))
    assert held(directory, 2) == {"te": 1}
    assert held(directory, 1) == {}
    directory.apply(events("te", 1, "1"))
    directory.load(dump("te", 2, 1, 2))  # older than what was applied
    assert held(directory, 1) == {}
    assert directory.feeds.unsynced() == []


def test_a_te_seen_in_mid_life_needs_a_dump() -> None:
    """A TE known from its beat alone, or whose first event is not number 1, is unsynced."""
    directory = Directory(max_bytes=ROOMY)
    directory.seen("quiet", "m")
    directory.apply(events("late", 57, "7"))
    assert directory.feeds.unsynced() == [("quiet", "m"), ("late", "m")]
    directory.load(dump("quiet", 0))
    directory.load(dump("late", 56, 1))
    assert directory.feeds.unsynced() == []
    assert held(directory, 1) == held(directory, 7) == {"late": 1}


def test_death_and_doubt() -> None:
    """A dead TE's pages are gone; after an outage everybody is asked again while the view stands."""
    directory = Directory(max_bytes=ROOMY)
    directory.apply(events("a", 1, "1"))
    directory.apply(events("b", 1, "1"))
    assert directory.remove("a")
    assert not directory.remove("a")
    assert held(directory, 1) == {"b": 1}
    directory.feeds.doubt()
    assert directory.feeds.unsynced() == [("b", "m")]
    assert held(directory, 1) == {"b": 1}


def test_waiting_events_are_bounded() -> None:
    """A TE whose dump never comes cannot pile up events; the next dump still mends everything."""
    directory = Directory(max_bytes=ROOMY)
    directory.seen("te", "m")
    for seq in range(2, 2000):
        hashes = [page(seq * 100 + n) for n in range(50)]
        directory.apply(BlockEvents(te="te", model="m", seq=seq, stored=hashes))
        directory.check()
    directory.load(dump("te", 1999, 1))
    assert directory.feeds.unsynced() == []
    assert held(directory, 1) == {"te": 1}
    assert MAX_WAITING_PAGES < 2000 * 50  # the bound was reached on the way


def test_budget_keeps_roots_and_is_shared_fairly() -> None:
    """Past the budget new pages are refused, a TE below its share takes the newest pages of the largest."""
    directory = Directory(max_bytes=100 * PAGE_BYTES)
    chain = [page(n) for n in range(150)]
    directory.apply(BlockEvents(te="big", model="m", seq=1, stored=chain))
    assert [h.num_pages for h in directory.match("m", chain)] == [100]
    small = [page(1000 + n) for n in range(80)]
    directory.apply(BlockEvents(te="small", model="m", seq=1, stored=small))
    directory.check()
    assert [h.num_pages for h in directory.match("m", chain)] == [50]
    assert [h.num_pages for h in directory.match("m", small)] == [50]
    assert directory.num_refused == 50 + 80
    assert directory.num_bytes == 100 * PAGE_BYTES


def test_room_again_asks_those_who_went_without() -> None:
    """When a TE leaves, a TE whose pages were refused is asked for all of them."""
    directory = Directory(max_bytes=100 * PAGE_BYTES)
    chain = [page(n) for n in range(100)]
    directory.apply(BlockEvents(te="one", model="m", seq=1, stored=chain))
    directory.apply(BlockEvents(te="two", model="m", seq=1, stored=chain))
    assert directory.feeds.unsynced() == []
    directory.remove("one")
    assert directory.feeds.unsynced() == [("two", "m")]
    directory.load(BlocksDump(te="two", model="m", seq=1, hashes=chain))
    assert held(directory, *range(100)) == {"two": 100}


def test_the_price_of_a_page_covers_its_memory() -> None:
    """What the indexes really take stays below what the account says."""
    gc.collect()
    tracemalloc.start()
    try:
        directory = Directory(max_bytes=ROOMY)
        for seq in range(1, 101):
            hashes = [page(seq * 1000 + n) for n in range(900)]
            directory.apply(BlockEvents(te="te", model="m", seq=seq, stored=hashes))
            del hashes
            if seq > 2:  # the empty index itself is not worth an account
                assert tracemalloc.get_traced_memory()[0] <= directory.num_bytes
    finally:
        tracemalloc.stop()
    assert directory.num_pages == 90_000


@pytest.mark.parametrize("tier", ["", "gpu", "DEVICE"])
def test_an_unknown_tier_holds_nothing(tier: str) -> None:
    """Pages in a tier this version does not know are not answered for, and their events still count."""
    directory = Directory(max_bytes=ROOMY)
    directory.apply(events("te", 1, "1", tier=tier))
    directory.apply(events("te", 2, "2"))
    assert held(directory, 1) == {}
    assert held(directory, 2) == {"te": 1}


class Against(RuleBasedStateMachine):
    """TEs with a true index each, a channel that loses, delays and repeats, and the directory at its end."""

    TES = ("a", "b")
    BUDGET = ROOMY

    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory(max_bytes=self.BUDGET)
        self.truth: dict[str, set[bytes]] = {}
        self.seq: dict[str, int] = {}
        self.channel: list[BlockEvents] = []
        self.view: dict[str, set[bytes]] = {}  # the truth when the TE was last in step
        self.told: dict[str, int] = {}  # the highest number the directory has heard of

    def _alive(self, te: str) -> None:
        if te not in self.truth:
            self.truth[te], self.seq[te], self.told[te] = set(), 0, 0

    @rule(
        te=st.sampled_from(TES),
        stored=st.sets(st.integers(0, 6), max_size=4),
        removed=st.sets(st.integers(0, 6), max_size=2),
    )
    def change(self, te: str, stored: set[int], removed: set[int]) -> None:
        """A TE's index changes, and says so."""
        self._alive(te)
        gone = {page(n) for n in removed} & self.truth[te]
        self.truth[te] = (self.truth[te] - gone) | {page(n) for n in stored}
        self.seq[te] += 1
        self.channel.append(
            BlockEvents(
                te=te, model="m", seq=self.seq[te], stored=pages(*stored), removed=sorted(gone)
            )
        )

    @precondition(lambda self: self.channel)
    @rule(
        data=st.data(),
        fate=st.sampled_from(["deliver", "deliver", "deliver", "repeat", "lose", "late"]),
    )
    def pass_on(self, data: st.DataObject, fate: str) -> None:
        """The channel hands over its first message, or repeats, loses or overtakes it."""
        at = 0 if fate != "late" else data.draw(st.integers(0, len(self.channel) - 1))
        message = self.channel[at]
        if fate != "repeat":
            del self.channel[at]
        if fate != "lose":
            self.told[message.te] = max(self.told[message.te], message.seq)
            self.directory.apply(message)

    @rule(te=st.sampled_from(TES))
    def ask(self, te: str) -> None:
        """The directory hears a beat and, if need be, asks for the whole index."""
        self._alive(te)
        self.directory.seen(te, "m")
        if (te, "m") in self.directory.feeds.unsynced():
            hashes = sorted(self.truth[te])
            self.directory.load(BlocksDump(te=te, model="m", seq=self.seq[te], hashes=hashes))
            self.told[te] = self.seq[te]
            assert (te, "m") not in self.directory.feeds.unsynced()

    @rule(te=st.sampled_from(TES))
    def die(self, te: str) -> None:
        """A TE dies, with all it had under way."""
        self.directory.remove(te)
        self.channel = [message for message in self.channel if message.te != te]
        for table in (self.truth, self.seq, self.told, self.view):
            table.pop(te, None)

    @invariant()
    def agrees(self) -> None:
        """A TE in step with all it said is answered exactly as a naive search over its true pages would."""
        self.directory.check()
        chain = pages(*range(7))
        answer = {h.te: h.num_pages for h in self.directory.match("m", chain)}
        for te, truth in self.truth.items():
            known = te in self.directory.holders()
            in_step = (
                known
                and (te, "m") not in self.directory.feeds.unsynced()
                and self.told[te] == self.seq[te]
            )
            naive = next((n for n, h in enumerate(chain) if h not in truth), len(chain))
            if in_step:
                assert answer.get(te, 0) == naive
        assert set(answer) <= set(self.truth)


class AgainstTight(Against):
    """The same with room for five pages in all: it may know less than the truth, never more."""

    BUDGET = 5 * PAGE_BYTES

    @invariant()
    def agrees(self) -> None:
        """Bounds hold, and no TE in step is said to hold what it does not."""
        self.directory.check()
        for te, truth in self.truth.items():
            known = te in self.directory.holders()
            if (
                known
                and (te, "m") not in self.directory.feeds.unsynced()
                and self.told[te] == self.seq[te]
            ):
                for number in range(7):
                    if held(self.directory, number).get(te):
                        assert page(number) in truth


TestAgainst = Against.TestCase
TestAgainst.settings = settings(max_examples=40 * LONG, stateful_step_count=40, deadline=None)
TestAgainstTight = AgainstTight.TestCase
TestAgainstTight.settings = settings(max_examples=25 * LONG, stateful_step_count=40, deadline=None)
