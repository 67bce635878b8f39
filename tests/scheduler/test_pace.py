"""How much batch work is in flight: as much as there is room for, in fair shares."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.pace import START, Pace, Turns


def simulate(rooms: list[int], seed: int, num_steps: int = 4000) -> tuple[list[int], int]:
    """A server with so much room at a time, and a client with ever more work: what is in flight, and refusals."""
    random = Random(seed)
    pace = Pace(256, random)
    flying: deque[tuple[float, float]] = deque()  # started, ends
    seen, num_refused = [], 0
    for step in range(num_steps):
        now = step * 0.01
        room = rooms[step * len(rooms) // num_steps]
        while flying and flying[0][1] <= now:
            flying.popleft()
            pace.succeeded(len(flying))
        while pace.can_start(len(flying), now):
            if len(flying) >= room:
                num_refused += 1
                pace.refused(now, now, None)
            else:
                flying.append((now, now + 0.05))
        seen.append(len(flying))
    return seen, num_refused


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 200), st.integers(0, 2**32))
def test_the_limit_finds_the_room_there_is(room: int, seed: int) -> None:
    """Much of the room is used once it has been found, and few are refused for it."""
    seen, num_refused = simulate([room], seed)
    settled = seen[len(seen) // 2 :]
    assert sum(settled) / len(settled) >= 0.4 * room
    assert num_refused <= len(seen) / 20


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32))
def test_the_limit_yields_when_room_is_taken_and_comes_back(seed: int) -> None:
    """Where nothing more is taken hardly anything is asked for; with room again, it is used again."""
    seen, num_refused = simulate([64, 0, 64, 64], seed, 8000)
    quarter = len(seen) // 4
    assert sum(seen[quarter + 50 : 2 * quarter]) == 0
    assert num_refused < 80
    tail = seen[-quarter // 2 :]
    assert sum(tail) / len(tail) >= 32


def test_refusals_of_one_round_count_once() -> None:
    """All that was in flight when there was no room is one sign, not many."""
    pace = Pace(256, Random(1))
    for _ in range(START):
        pace.refused(1.0, 2.0, None)
    assert pace.limit == pytest.approx(START * 0.7)


async def test_turns_are_shared_among_tenants() -> None:
    """A tenant with a thousand lines does not keep one with ten from its share."""
    turns = Turns(Pace(4, Random(1)))
    order: list[str] = []

    async def one(tenant: str) -> None:
        async with turns.turn(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(200):
            group.create_task(one("many"))
        for tenant in ("few", "fewer"):
            for _ in range(10):
                group.create_task(one(tenant))
    assert Counter(order) == {"many": 200, "few": 10, "fewer": 10}
    assert {"few", "fewer"} <= set(order[:12])
    assert set(order[40:]) == {"many"}
    assert turns.is_idle


async def test_with_one_turn_at_a_time_tenants_alternate() -> None:
    """Also where the limit is one, nobody waits for another's whole queue."""
    turns = Turns(Pace(1, Random(1)))
    order: list[str] = []

    async def one(tenant: str) -> None:
        async with turns.turn(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(6):
            group.create_task(one("a"))
        for _ in range(3):
            group.create_task(one("b"))
    assert "".join(order) in ("ababab" + "aaa", "aababab" + "aa")


async def test_whoever_leaves_while_waiting_takes_no_turn() -> None:
    """Cancelled before or just as their turn comes, they leave no turn behind."""
    turns = Turns(Pace(1, Random(1)))
    held = asyncio.Event()

    async def one() -> None:
        async with turns.turn("t"):
            await held.wait()

    tasks = [asyncio.create_task(one()) for _ in range(5)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    tasks[0].cancel()  # its turn goes to the next
    await asyncio.sleep(0)
    tasks[1].cancel()
    held.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert turns.is_idle


async def test_after_a_pause_turns_go_on_by_themselves() -> None:
    """Nobody has to come for what waits to be started."""
    now = asyncio.get_running_loop().time
    turns = Turns(Pace(4, Random(1)), now)
    turns.pace.refused(now(), now(), 0.1)

    async with asyncio.timeout(5), turns.turn("t"):
        assert turns.num_in_flight == 1
