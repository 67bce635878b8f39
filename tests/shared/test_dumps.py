"""Asking for whole indexes: few at once, each holder once at a time, and again when it did not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from prometheus_client import CollectorRegistry, Counter

from shared import dumps, log
from shared.block_feed import BlockFeeds
from shared.dumps import Dumps
from shared.errors import Unavailable
from shared.rtc_messages import BlockEvents, BlocksDump


class Holders:
    """Holders whose answers the test lets go."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, asyncio.Future[int]] = {}

    async def ask(self, holder: str, model: str) -> BlocksDump:
        """Waits for the test's word: the number of the dump's last event."""
        self.asked.append(holder)
        self.answers[holder] = asyncio.get_running_loop().create_future()
        return BlocksDump(te=holder, model=model, seq=await self.answers[holder], hashes=[])


@pytest.fixture
async def tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """Where the questions run; all are over at the end."""
    async with asyncio.TaskGroup() as group:
        yield group


@pytest.fixture
def holders() -> Holders:
    """See `Holders`."""
    return Holders()


def asker(
    feeds: BlockFeeds,
    holders: Holders,
    tasks: asyncio.TaskGroup,
    alive: Callable[[str], bool] = bool,
) -> tuple[Dumps, list[BlocksDump]]:
    """Something that asks, and what it loaded."""
    loaded: list[BlocksDump] = []

    def load(dump: BlocksDump) -> None:
        loaded.append(dump)
        feeds.load(dump)

    counter = Counter("outcomes", "Test.", ["outcome"], registry=CollectorRegistry())
    return (
        Dumps(
            feeds,
            ask=holders.ask,
            load=load,
            alive=alive,
            tasks=tasks,
            log=log.get(),
            outcomes=counter,
        ),
        loaded,
    )


async def settle() -> None:
    """Lets everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_few_at_once_and_each_once_at_a_time(
    tasks: asyncio.TaskGroup, holders: Holders
) -> None:
    """All are asked in the end, never more than four at a time, and none twice however often it is looked at."""
    feeds = BlockFeeds()
    for number in range(9):
        feeds.seen(f"te-{number}", "m")
    asking, loaded = asker(feeds, holders, tasks)
    waiting: set[str] = set()
    for _ in range(9):
        asking.catch_up()
        await settle()
        waiting = {te for te, answer in holders.answers.items() if not answer.done()}
        assert 0 < len(waiting) <= 4
        holders.answers[min(waiting)].set_result(0)
        await settle()
    asking.catch_up()
    await settle()
    assert sorted(holders.asked) == sorted(dump.te for dump in loaded)
    assert len(loaded) == 9
    assert feeds.unsynced() == []


async def test_who_does_not_answer_is_asked_again(
    tasks: asyncio.TaskGroup, holders: Holders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed question leaves the holder out of step, and is put again after a while, not before."""
    feeds = BlockFeeds()
    feeds.seen("te", "m")
    asking, loaded = asker(feeds, holders, tasks)
    asking.catch_up()
    await settle()
    holders.answers["te"].set_exception(Unavailable("nobody listens"))
    await settle()
    asking.catch_up()
    await settle()
    assert holders.asked == ["te"]
    now = dumps.time.monotonic()
    monkeypatch.setattr(dumps.time, "monotonic", lambda: now + 5.0)
    asking.catch_up()
    await settle()
    holders.answers["te"].set_result(3)
    await settle()
    assert holders.asked == ["te", "te"]
    assert [dump.seq for dump in loaded] == [3]


async def test_the_index_of_one_that_died_meanwhile_is_not_loaded(
    tasks: asyncio.TaskGroup, holders: Holders
) -> None:
    """An answer that comes after its holder's death changes nothing, and leaves nothing behind."""
    feeds = BlockFeeds()
    feeds.seen("te", "m")
    living = {"te"}
    asking, loaded = asker(feeds, holders, tasks, living.__contains__)
    asking.catch_up()
    await settle()
    living.clear()
    feeds.remove("te")
    asking.gone("te")
    holders.answers["te"].set_result(3)
    await settle()
    assert loaded == []
    assert feeds.unsynced() == []


async def test_a_warm_up_waits_for_the_answers_and_no_longer_than_it_may(
    tasks: asyncio.TaskGroup, holders: Holders
) -> None:
    """Whoever answers in time is loaded when it returns; one that is silent only costs the time."""
    feeds = BlockFeeds()
    feeds.seen("quick", "m")
    feeds.seen("silent", "m")
    asking, loaded = asker(feeds, holders, tasks)
    warming = tasks.create_task(asking.warm_up(0.3))
    await settle()
    holders.answers["quick"].set_result(0)
    await warming
    assert [dump.te for dump in loaded] == ["quick"]
    assert feeds.unsynced() == [("silent", "m")]


def test_doubt_reaches_whom_it_names() -> None:
    """Doubt about one index leaves the others in step, doubt without a name leaves none."""
    feeds = BlockFeeds()
    for holder, model in (("a", "m"), ("a", "n"), ("b", "m")):
        assert feeds.take(BlockEvents(te=holder, model=model, seq=1))
    assert feeds.unsynced() == []
    feeds.doubt("a", "n")
    assert feeds.unsynced() == [("a", "n")]
    assert feeds.num_unsynced == 1
    feeds.doubt()
    assert len(feeds.unsynced()) == 3
    feeds.check()
