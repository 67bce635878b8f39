"""The prompt trees against naive models: prefixes, assumptions, lost and late events, dumps, deaths, and the budget."""

from __future__ import annotations

import gc
import os
import tracemalloc
from itertools import takewhile
from random import Random
from typing import ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.scheduler.prompt_tree import PAGE_BYTES, PromptTree, PromptTrees
from shared.rtc_messages import BlockEvents, BlocksDump

ROOMY = 1 << 30
LONG = 10 if os.environ.get("DEEPFLOW_SOAK") else 1


def page(number: int) -> bytes:
    """The hash of a page."""
    return number.to_bytes(16, "big")


def chain(num: int, *, first: int = 0, branch: int = 0, fork: int = 0) -> list[bytes]:
    """A prompt of `num` pages; from page `fork` on it is that of another `branch`."""
    return [page(first + n + (branch << 64) * (n >= fork)) for n in range(num)]


def events(te: str, seq: int, stored: str = "", removed: str = "", model: str = "m") -> BlockEvents:
    """An event about pages named by single digits."""
    return BlockEvents(
        te=te,
        model=model,
        seq=seq,
        stored=[page(int(n)) for n in stored],
        removed=[page(int(n)) for n in removed],
    )


def test_a_prefix_ends_at_the_first_page_that_is_missing() -> None:
    """Each TE is answered with the pages it holds from the first on, and not at all without the first one."""
    tree = PromptTree(max_bytes=ROOMY)
    pages = chain(6)
    tree.stored("whole", pages)
    tree.stored("broken", pages[:2] + pages[3:])
    tree.stored("headless", pages[1:])
    assert tree.match(pages, 0.0) == {"whole": 6, "broken": 2}
    assert tree.match([*pages[:4], page(99), *pages[4:]], 0.0) == {"whole": 4, "broken": 2}
    assert tree.match([], 0.0) == {}
    tree.removed("whole", pages[1:2])
    assert tree.match(pages, 0.0) == {"whole": 1, "broken": 2}
    tree.check()


def test_an_assumption_counts_at_once_and_ends_by_itself() -> None:
    """A TE counts as holder of the prompt it was just given; another prompt finds the common part, for that long."""
    tree = PromptTree(max_bytes=ROOMY)
    tree.assume("te", chain(12), 10.0, 2.0)
    assert tree.match(chain(12), 10.0) == {"te": 12}
    assert tree.match(chain(20), 11.9) == {"te": 12}
    assert tree.match(chain(12, branch=1, fork=5), 11.9) == {"te": 5}
    assert tree.match(chain(12), 12.0) == {}
    tree.check()
    assert tree.num_bytes == 0


def test_an_assumption_is_renewed_and_never_shortened() -> None:
    """Of two assumptions about a page the one that ends later counts."""
    tree = PromptTree(max_bytes=ROOMY)
    tree.assume("te", chain(6), 0.0, 5.0)
    tree.assume("te", chain(3), 1.0, 1.0)
    tree.assume("te", chain(4), 1.0, 10.0)
    assert tree.match(chain(6), 4.0) == {"te": 6}
    assert tree.match(chain(6), 5.0) == {"te": 4}
    assert tree.match(chain(6), 11.0) == {}
    tree.check()


def test_what_is_announced_outlives_the_assumption() -> None:
    """Block events and assumptions are kept apart: each counts as long as it holds."""
    tree = PromptTree(max_bytes=ROOMY)
    tree.assume("te", chain(8), 0.0, 1.0)
    tree.stored("te", chain(5))
    assert tree.match(chain(8), 0.5) == {"te": 8}
    tree.removed("te", chain(5)[4:])
    assert tree.match(chain(8), 0.5) == {"te": 8}
    assert tree.match(chain(8), 1.0) == {"te": 4}


def test_a_dump_replaces_what_was_known_and_keeps_what_is_assumed() -> None:
    """Only pages of the dump are held, however the index was before; a prompt that was given is on its way still."""
    tree = PromptTree(max_bytes=ROOMY)
    tree.stored("te", chain(6))
    tree.stored("other", chain(6))
    tree.assume("te", chain(3, first=50), 0.0, 1.0)
    tree.replace("te", chain(2))
    tree.check()
    assert tree.match(chain(6), 0.5) == {"te": 2, "other": 6}
    assert tree.match(chain(3, first=50), 0.5) == {"te": 3}
    assert tree.match(chain(3, first=50), 1.0) == {}


def test_tes_that_come_and_go_leave_nothing_behind() -> None:
    """A TE's pages go with it, and its place in the masks is given to others: they do not grow for ever."""
    tree = PromptTree(max_bytes=ROOMY)
    for number in range(500):
        tree.stored(f"te-{number}", chain(40, first=number % 7))
        tree.assume(f"te-{number}", chain(20), float(number), 1.0)
        if number >= 3:
            tree.forget(f"te-{number - 3}")
        tree.check()
    assert set(tree.match(chain(40, first=499 % 7), 500.0)) <= {"te-497", "te-498", "te-499"}
    per_page = PAGE_BYTES + 32  # a mask of one digit: few places were ever taken
    assert tree.num_bytes == tree.num_pages * per_page
    for number in (497, 498, 499):
        tree.forget(f"te-{number}")
    assert tree.num_bytes == 0
    assert tree.match(chain(40), 500.0) == {}


def test_a_large_tree_is_swept_little_by_little() -> None:
    """TEs that leave, or tell their whole index anew, while others change the tree: every answer is that of the sets
    of pages they hold."""
    tree, random = PromptTree(max_bytes=ROOMY), Random(0)
    pages = chain(20_000)
    truth: dict[str, set[bytes]] = {}
    for step in range(300):
        te = f"te-{random.randrange(12)}"
        start = random.choice((0, 0, random.randrange(20_000)))
        some = pages[start : start + random.randrange(6000)]
        match random.randrange(5):
            case 0:
                tree.forget(te)
                truth.pop(te, None)
            case 1:
                tree.replace(te, some)
                truth[te] = set(some)
            case 2:
                tree.removed(te, some[:50])
                truth.get(te, set()).difference_update(some[:50])
            case _:
                tree.stored(te, some)
                truth.setdefault(te, set()).update(some)
        found = tree.match(pages, 0.0)
        naive = {
            te: sum(1 for _ in takewhile(held.__contains__, pages)) for te, held in truth.items()
        }
        assert found == {te: num for te, num in naive.items() if num}
        if step % 30 == 0:
            tree.check()


def test_the_budget_costs_what_nobody_asks_for() -> None:
    """Past the budget the pages go that were used least lately, the tail of a chain before its root."""
    tree = PromptTree(max_bytes=1000 * 300)
    used, idle = chain(200, first=10_000), chain(200, first=20_000)
    tree.stored("te", used)
    tree.stored("te", idle)
    for number in range(20):
        tree.stored("te", chain(100, first=100_000 + 1000 * number))
        tree.assume("te", used, float(number), 0.5)
        tree.check()
    assert tree.num_evicted
    held = tree.match(used, 100.0)
    assert held == {"te": 200}
    assert tree.match(idle, 100.0) == {}
    tree.stored("te", chain(2000, first=200_000))
    tree.check()
    assert 1000 < tree.match(chain(2000, first=200_000), 100.0)["te"] < 2000


def test_assumptions_have_a_budget() -> None:
    """What is assumed can fill but a part of the budget; then nothing more is assumed, and all that was announced
    stays."""
    tree = PromptTree(max_bytes=1000 * 300)
    tree.stored("te", chain(500))
    for number in range(1000):
        tree.assume("te", chain(30, first=1000 * number), 0.0, 1e6)
        tree.check()
    assert tree.match(chain(500), 1.0) == {"te": 500}
    assert tree.match(chain(30, first=1000), 1.0) == {"te": 30}
    assert tree.match(chain(30, first=999_000), 1.0) == {}


def test_the_price_of_a_page_covers_its_memory() -> None:
    """What a tree really takes stays below what its account says, also with many TEs, dumps and assumptions."""
    gc.collect()
    tracemalloc.start()
    try:
        tree = PromptTree(max_bytes=ROOMY)
        for number in range(120):
            te = f"te-{number % 60}"
            pages = chain(900, first=number * 1000)
            (tree.replace if number % 7 == 0 else tree.stored)(te, pages)
            tree.stored(te, chain(50))  # masks of their own
            tree.assume(te, chain(300, first=number * 5000), float(number), 30.0)
            del pages
            if number > 2:  # the empty tree itself is not worth an account
                assert tracemalloc.get_traced_memory()[0] <= tree.num_bytes
    finally:
        tracemalloc.stop()
    tree.check()
    assert tree.num_pages > 90_000


@settings(max_examples=60 * LONG, deadline=None)
@given(num=st.integers(1, 3000), other=st.integers(1, 3000), fork=st.integers(0, 3000))
def test_an_assumed_prefix_falls_short_by_one_in_eight_at_most(
    num: int, other: int, fork: int
) -> None:
    """However long the prompts: never more than they have in common, at least seven eighths, and all of 16 pages."""
    tree = PromptTree(max_bytes=ROOMY)
    tree.assume("te", chain(num), 0.0, 1.0)
    common = min(num, other, fork)
    told = tree.match(chain(other, branch=1, fork=fork), 0.0).get("te", 0)
    assert 7 * common <= 8 * told <= 8 * common
    assert told == common or common > 16


def test_one_tree_for_each_type_of_each_model() -> None:
    """TEs are asked about by model and role; of one that has not been seen, or of another model, nothing is taken."""
    trees = PromptTrees()
    trees.seen("p", "m", "prefill")
    trees.seen("c", "m", "colocated")
    trees.seen("n", "n", "colocated")
    for te, model in (("p", "m"), ("c", "m"), ("n", "n"), ("stranger", "m"), ("n", "m")):
        trees.apply(events(te, 1, "12", model=model))
    trees.assume("stranger", chain(3), 0.0, 1.0)
    pages = [page(1), page(2)]
    assert trees.match("m", "prefill", pages, 0.0) == {"p": 2}
    assert trees.match("m", "colocated", pages, 0.0) == {"c": 2}
    assert trees.match("n", "colocated", pages, 0.0) == {"n": 2}
    assert trees.match("n", "prefill", pages, 0.0) == {}
    assert [(tree["model"], tree["role"], tree["pages"]) for tree in trees.status()] == [
        ("m", "prefill", 2),
        ("m", "colocated", 2),
        ("n", "colocated", 2),
    ]
    trees.check()


def test_a_te_in_another_role_starts_anew() -> None:
    """A TE whose beats name another role is asked for its index again, and is found under that role alone."""
    trees = PromptTrees()
    trees.seen("te", "m", "decode")
    trees.load(BlocksDump(te="te", model="m", seq=0, hashes=chain(3)))
    trees.seen("te", "m", "decode")
    assert trees.unsynced() == []
    trees.seen("te", "m", "colocated")
    assert trees.unsynced() == [("te", "m")]
    trees.load(BlocksDump(te="te", model="m", seq=0, hashes=chain(3)))
    assert trees.match("m", "decode", chain(3), 0.0) == {}
    assert trees.match("m", "colocated", chain(3), 0.0) == {"te": 3}
    trees.check()
    assert trees.gone("te")
    assert not trees.gone("te")
    assert trees.status() == []


def test_pages_that_a_te_has_only_elsewhere_do_not_count() -> None:
    """Another tier than the device advances the numbers and holds nothing to compute from."""
    trees = PromptTrees()
    trees.seen("te", "m", "colocated")
    trees.load(BlocksDump(te="te", model="m", seq=0, hashes=chain(3), tier="host"))
    trees.apply(BlockEvents(te="te", model="m", seq=1, stored=chain(3), tier="ssd"))
    trees.apply(BlockEvents(te="te", model="m", seq=2, stored=chain(2)))
    assert trees.unsynced() == []
    assert trees.match("m", "colocated", chain(3), 0.0) == {"te": 2}


def test_one_budget_for_all_trees() -> None:
    """When all together have too much the largest gives up pages; a small one keeps what it has."""
    trees = PromptTrees(max_bytes=1000 * (PAGE_BYTES + 32))
    for te, model in (("big", "a"), ("small", "b")):
        trees.seen(te, model, "colocated")
        trees.load(BlocksDump(te=te, model=model, seq=0, hashes=[]))
    trees.apply(BlockEvents(te="small", model="b", seq=1, stored=chain(100)))
    for seq in range(1, 31):
        pages = chain(100, first=seq * 100)
        trees.apply(BlockEvents(te="big", model="a", seq=seq, stored=pages))
        trees.check()
    assert trees.match("b", "colocated", chain(100), 0.0) == {"small": 100}
    assert trees.match("a", "colocated", pages, 0.0) == {"big": 100}
    assert trees.num_pages <= 1000 < trees.num_pages + trees.num_evicted


def test_assumptions_of_all_trees_share_one_part_of_the_budget() -> None:
    """However many models are assumed to be busy, what was announced of another one keeps most of the budget; once the
    assumptions of idle models have ended there is room for others."""
    trees = PromptTrees(max_bytes=1 << 16)
    for number in range(12):
        trees.seen(f"te-{number}", f"m{number}", "colocated")
    trees.load(BlocksDump(te="te-0", model="m0", seq=0, hashes=chain(200)))
    for number in range(1, 12):
        for prompt in range(20):
            trees.assume(f"te-{number}", chain(10, first=1000 * prompt), 0.0, 5.0)
            trees.check()
    assert trees.match("m0", "colocated", chain(200), 1.0) == {"te-0": 200}
    trees.assume("te-11", chain(10), 1.0, 5.0)
    assert trees.match("m11", "colocated", chain(10), 1.0) == {}
    trees.assume("te-11", chain(10), 6.0, 5.0)
    assert trees.match("m11", "colocated", chain(10), 6.0) == {"te-11": 10}
    for seq in range(1, 10):
        pages = chain(100, first=10_000 * seq)
        trees.apply(BlockEvents(te="te-0", model="m0", seq=seq, stored=pages))
        trees.check()


class Against(RuleBasedStateMachine):
    """TEs of two roles with a true index each, a channel that loses, delays and repeats, and the trees at its end."""

    TES = ("a", "b", "c")
    ROLES: ClassVar = {"a": "colocated", "b": "colocated", "c": "prefill"}
    CHAIN = 7
    BUDGET = ROOMY

    def __init__(self) -> None:
        super().__init__()
        self.trees = PromptTrees(max_bytes=self.BUDGET)
        self.now = 0.0
        self.truth: dict[str, set[bytes]] = {}
        self.seq: dict[str, int] = {}
        self.told: dict[str, int] = {}  # the highest number the trees have heard of
        self.channel: list[BlockEvents] = []
        self.given: list[tuple[str, int, float]] = []  # (TE, pages, until when)

    def alive(self, te: str) -> None:
        """The TE runs, and beats."""
        if te not in self.truth:
            self.truth[te], self.seq[te], self.told[te] = set(), 0, 0
        self.trees.seen(te, "m", self.ROLES[te])

    @rule(
        te=st.sampled_from(TES),
        stored=st.sets(st.integers(0, CHAIN - 1), max_size=CHAIN),
        removed=st.sets(st.integers(0, CHAIN - 1), max_size=2),
    )
    def change(self, te: str, stored: set[int], removed: set[int]) -> None:
        """A TE's index changes, and says so."""
        self.alive(te)
        gone = {page(n) for n in removed} & self.truth[te]
        new = [page(n) for n in sorted(stored)]
        self.truth[te] = (self.truth[te] - gone) | set(new)
        self.seq[te] += 1
        self.channel.append(
            BlockEvents(te=te, model="m", seq=self.seq[te], stored=new, removed=sorted(gone))
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
            self.trees.apply(message)

    @rule(te=st.sampled_from(TES), stale=st.booleans())
    def ask(self, te: str, stale: bool) -> None:
        """A TE that is out of step is asked for its whole index; an answer may be older than what was heard."""
        self.alive(te)
        if (te, "m") in self.trees.unsynced():
            if stale:
                self.trees.load(BlocksDump(te=te, model="m", seq=0, hashes=[]))
            hashes = sorted(self.truth[te])
            self.trees.load(BlocksDump(te=te, model="m", seq=self.seq[te], hashes=hashes))
            self.told[te] = self.seq[te]
            assert (te, "m") not in self.trees.unsynced()

    @rule()
    def doubt(self) -> None:
        """The bus was away: everybody is to be asked, and the view stands."""
        self.trees.doubt()
        assert len(self.trees.unsynced()) == len(self.truth)

    @rule(te=st.sampled_from(TES), num=st.integers(1, CHAIN), for_s=st.integers(1, 5))
    def assume(self, te: str, num: int, for_s: int) -> None:
        """A TE is given a prompt."""
        self.trees.assume(te, chain(num), self.now, float(for_s))
        if te in self.truth:
            self.given.append((te, num, self.now + for_s))

    @rule(by=st.integers(1, 3))
    def wait(self, by: int) -> None:
        """Time passes."""
        self.now += by

    @rule(te=st.sampled_from(TES))
    def die(self, te: str) -> None:
        """A TE dies, with all it had under way."""
        assert self.trees.gone(te) == (te in self.truth)
        self.channel = [message for message in self.channel if message.te != te]
        self.given = [given for given in self.given if given[0] != te]
        for table in (self.truth, self.seq, self.told):
            table.pop(te, None)

    def in_step(self, te: str) -> bool:
        """Whether the trees have heard all that the TE said of what they were told to expect."""
        return (te, "m") not in self.trees.unsynced() and self.told[te] == self.seq[te]

    def assumed(self, te: str) -> int:
        """Pages of the chain that are on their way to it."""
        return max(
            (num for of, num, until in self.given if of == te and until > self.now), default=0
        )

    @invariant()
    def agrees(self) -> None:
        """A TE in step is answered exactly as a naive search over its true pages and last prompts would."""
        self.trees.check()
        pages = chain(self.CHAIN)
        found = {
            role: self.trees.match("m", role, pages, self.now) for role in ("colocated", "prefill")
        }
        for te, truth in self.truth.items():
            naive = next((n for n, h in enumerate(pages) if h not in truth), len(pages))
            told = found[self.ROLES[te]].get(te, 0)
            self.judge(te, told, naive)
        for role, held in found.items():
            assert {te for te in self.truth if self.ROLES[te] == role} >= set(held)
            assert all(held.values())

    def judge(self, te: str, told: int, naive: int) -> None:
        """What was said of a TE that holds `naive` pages of the prompt."""
        assert told >= self.assumed(te)
        if self.in_step(te):
            assert told == max(naive, self.assumed(te))


class AgainstTight(Against):
    """The same with room for a few pages in all: the trees may know less than the truth, never more."""

    BUDGET = 5 * (PAGE_BYTES + 32)

    def judge(self, te: str, told: int, naive: int) -> None:
        """See `Against`."""
        if self.in_step(te):
            assert told <= max(naive, self.assumed(te))


TestAgainst = Against.TestCase
TestAgainst.settings = settings(max_examples=40 * LONG, stateful_step_count=40, deadline=None)
TestAgainstTight = AgainstTight.TestCase
TestAgainstTight.settings = settings(max_examples=25 * LONG, stateful_step_count=40, deadline=None)
