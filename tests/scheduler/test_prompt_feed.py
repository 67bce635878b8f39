"""A Job Executor's prompt trees as a real process on a real bus; the test plays the TEs with their block events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared.bus import Bus
from shared.messages import Down, TeBeat
from tests.nats_server import NatsServer
from tests.scheduler.players import (
    MODEL,
    Client,
    Te,
    eventually,
    process,
    publish_model,
    status,
    wait_ready,
)

CHAIN = [number.to_bytes(16, "big") for number in range(8)]
PROMPT = {"prompt": list(range(8 * 16 + 1)), "hashes": CHAIN}


@pytest.fixture
async def je(nats: NatsServer, bus: Bus) -> AsyncIterator[str]:
    """A running JE with one model in the catalogue; its id."""
    await publish_model(bus)
    async with process("scheduler", nats, DEEPFLOW_TASK_TIMEOUT_S="1.5") as (_, name):
        await wait_ready(bus, "scheduler", name)
        yield name


async def prompts(bus: Bus, je: str) -> dict[str, Any]:
    """What the JE says of its trees."""
    body: dict[str, Any] = (await status(bus, "scheduler", je))["prompts"]
    return body


async def held(bus: Bus, je: str, **trees: int) -> None:
    """Waits until the JE's trees have so many pages by role, and nobody is out of step."""

    async def holds() -> bool:
        body = await prompts(bus, je)
        found = {tree["role"]: tree["pages"] for tree in body["trees"]}
        return found == trees and not body["unsynced"]

    await eventually(holds)


async def matched(bus: Bus, je: str, name: str) -> dict[str, int]:
    """TE -> pages of the prompt that it was thought to hold when this request was placed."""
    decisions = (await status(bus, "scheduler", je))["decisions"]
    (decision,) = [d for d in decisions if d["request"] == name]
    return {c["te"]: c["matched_pages"] for c in decision["candidates"]}


async def test_a_prompt_is_found_where_it_was_announced(bus: Bus, je: str) -> None:
    """Events, dumps of a TE met in mid-life, and a lost event all lead to the pages that a TE really has; a prompt that
    was just placed counts before any event."""
    early = Te(bus, "te-early")
    early.seq, early.pages = 41, dict.fromkeys(CHAIN[:5])
    async with early, Te(bus, "te-new") as new, Client(bus) as client:
        await held(bus, je, colocated=5)
        assert early.num_dumps == 1
        await new.change(CHAIN[:2])
        await early.change([CHAIN[5]], removed=[CHAIN[1]])
        await held(bus, je, colocated=6)
        first = await client.submit("r1", **PROMPT)
        await client.submit("r2", **PROMPT)
        assert await matched(bus, je, "r1") == {"te-early": 1, "te-new": 2}
        second = await matched(bus, je, "r2")
        assert second.pop(first.te or "") == 8  # assumed: it has the whole prompt by now, or soon
        assert second in ({"te-early": 1}, {"te-new": 2})

        gaps = (await prompts(bus, je))["gaps"]
        await early.change([CHAIN[1]], lost=True)
        await early.change([CHAIN[6]])
        await held(bus, je, colocated=7)
        assert (early.num_dumps, (await prompts(bus, je))["gaps"]) == (2, gaps + 1)


async def test_the_pages_of_a_dead_te_are_gone(bus: Bus, je: str) -> None:
    """A TE's pages leave with it, each role has a tree of its own, and late words of the dead bring nothing back."""
    async with Te(bus, "te-p", role="prefill") as gone, Te(bus, "te-d", role="decode") as stays:
        await held(bus, je, prefill=0, decode=0)
        await gone.change(CHAIN)
        await stays.change(CHAIN[:3])
        await held(bus, je, prefill=8, decode=3)
        await bus.publish(
            bus.subjects.down("te", "te-p"), Down(kind="te", id="te-p", reason="killed")
        )
        await held(bus, je, decode=3)
        await gone.change([b"x" * 16])
        beat = TeBeat(id="te-p", model=MODEL, pod="pod-1", state="ready", role="prefill")
        await bus.publish(bus.subjects.beat("te", "te-p"), beat)
        await stays.change(CHAIN[3:4])
        await held(bus, je, decode=4)
