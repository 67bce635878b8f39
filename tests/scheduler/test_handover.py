"""Prefill on one TE, decode on another, as a JE arranges it: a real JE process; the test plays TEs and gateway."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.scheduler.heatmap import Heatmap
from shared.bus import Bus
from shared.errors import Overloaded
from shared.messages import Cancel, Down, Progress, Sampling, Task, TaskKind
from shared.subjects import encode
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

ENV = {"DEEPFLOW_PD_MIN_TOKENS": "64", "DEEPFLOW_TASK_TIMEOUT_S": "1.5"}
LONG = list(range(100))


@pytest.fixture
async def je(nats: NatsServer, bus: Bus, tmp_path: Path) -> AsyncIterator[str]:
    """A running JE that splits prompts of 64 tokens, whatever they bring; its id."""
    await publish_model(bus)
    always = Heatmap(
        prefill_lens=(1,), ratios=(1.0,), rates=(1.0,), values=(((0.5,),),), source="engine"
    )
    (tmp_path / f"{encode(MODEL)}.json").write_bytes(always.to_json())
    async with process("scheduler", nats, **ENV, DEEPFLOW_HEATMAPS=str(tmp_path)) as (_, name):
        await wait_ready(bus, "scheduler", name)
        yield name


@pytest.fixture
async def client(bus: Bus) -> AsyncIterator[Client]:
    """A gateway."""
    async with Client(bus) as client:
        yield client


@contextlib.asynccontextmanager
async def tes(bus: Bus, je: str, **roles: str) -> AsyncIterator[dict[str, Te]]:
    """TEs of these names and roles, once the JE knows them as ready."""
    async with contextlib.AsyncExitStack() as stack:
        played = {}
        for name, role in roles.items():
            te = Te(bus, name, role=role, blocks_total=100)
            played[name] = await stack.enter_async_context(te)

        async def known() -> bool:
            seen = (await status(bus, "scheduler", je))["tes"]
            return {(te["id"], te["role"]) for te in seen} >= set(roles.items())

        await eventually(known)
        yield played


async def asked(te: Te) -> Task:
    """The one task that a TE was asked to take."""
    await eventually(lambda: len(te.tasks) == 1)
    return te.tasks[0]


async def idle(bus: Bus, je: str) -> None:
    """Until the JE answers for nothing any more."""

    async def holds() -> bool:
        return int((await status(bus, "scheduler", je))["active"]) == 0

    await eventually(holds)


def moves(client: Client) -> list[str | None]:
    """Where requests were said to have moved."""
    return [f.te for f in client.frames if isinstance(f, Progress) and f.state == "moved"]


async def test_a_pair_of_tasks(bus: Bus, je: str, client: Client) -> None:
    """The prefill TE is asked first; once it is done the decode TE with the most room for KV gets the second task, with
    the first token, what is left of the deadline, and where the pages are; and the client learns who goes on."""
    async with tes(bus, je, p="prefill", d="decode", full="decode", c="colocated") as te:
        te["full"].load |= {"blocks_used": 40, "blocks_reserved": 50}
        te["d"].load |= {"blocks_used": 60, "outstanding_s": 9.0}
        await asyncio.sleep(0.3)
        accepted = await client.submit("r1", prompt=LONG, output=[[5]], attempt=2)
        assert (accepted.te, accepted.by) == ("p", je)
        prefill = await asked(te["p"])
        assert (prefill.kind, prefill.handover) == (TaskKind.PREFILL, None)
        await asyncio.sleep(0.2)
        assert not te["d"].tasks
        await te["p"].handed(prefill)
        await te["p"].ended(prefill, "handed")
        decode = await asked(te["d"])
        assert decode.kind is TaskKind.DECODE
        assert decode.job == prefill.job
        assert decode.task != prefill.task
        assert decode.handover is not None
        assert (decode.handover.te, decode.handover.lease) == ("p", "lease-1")
        assert (decode.request.output, decode.request.attempt) == ([[5, 7]], 2)
        assert 0 < decode.request.deadline_ms <= prefill.request.deadline_ms - 200
        await eventually(lambda: moves(client) == ["d"])
        await te["p"].handed(prefill)  # repeated
        await asyncio.sleep(0.1)
        assert not te["p"].cancels
        await te["d"].ended(decode, "stop")
        await idle(bus, je)
        # Should it hold the pages still: nobody will fetch them.
        await eventually(lambda: te["p"].cancels == [Cancel(request="r1", attempt=2)])
        assert [len(te[name].tasks) for name in ("p", "d", "full", "c")] == [1, 1, 0, 0]
        decision = (await status(bus, "scheduler", je))["decisions"][0]
        assert (decision["kind"], decision["chosen"]) == ("decode", "d")
        assert [c["kv_use"] for c in decision["candidates"][:2]] == [0.6, 0.9]


NOT_SPLIT: dict[str, dict[str, Any]] = {
    "short": {"prompt": LONG[:60]},
    "two choices": {"prompt": LONG, "sampling": Sampling(max_tokens=5, seed=1, n=2)},
    "a context cache": {"prompt": LONG, "kind": "cache"},
    "spliced": {"prompt": LONG, "chunks": [[0, 16]]},
    "lost thrice": {"prompt": LONG, "attempt": 4},
    "avoided": {"prompt": LONG, "avoid": ["p"]},
}


async def test_not_split(bus: Bus, je: str, client: Client) -> None:
    """What gains nothing by it, or failed at it, is generated in one place."""
    async with tes(bus, je, p="prefill", d="decode", c="colocated") as te:
        for name, fields in NOT_SPLIT.items():
            assert (await client.submit(name, **fields)).te == "c", name
            assert te["c"].tasks[-1].kind is TaskKind.GENERATE, name


async def test_a_cached_prompt_is_not_split(bus: Bus, je: str, client: Client) -> None:
    """What some TE holds need not be prefilled; what is beyond that may still be enough."""
    four = [bytes([n]) * 16 for n in range(4)]

    async with tes(bus, je, p="prefill", d="decode", c="colocated") as te:
        await te["c"].change(four)
        await bus.flush()
        await eventually(lambda: knows(bus, je, 4))
        assert (await client.submit("r1", prompt=LONG, hashes=four)).te == "c"
        assert (await client.submit("r2", prompt=LONG)).te == "p"
        long = [*LONG, *LONG]  # four pages of it are 64 tokens
        assert (await client.submit("r3", prompt=long, hashes=four)).te == "p"
        assert (await client.submit("r4", prompt=LONG[:60], hashes=four[:3])).te == "c"


async def knows(bus: Bus, je: str, num_pages: int) -> bool:
    """Whether the JE's prompt trees have so many pages."""
    trees = (await status(bus, "scheduler", je))["prompts"]["trees"]
    return sum(tree["pages"] for tree in trees) == num_pages


async def test_any_te_serves_where_its_role_is_missing(bus: Bus, je: str, client: Client) -> None:
    """Without colocated TEs, or without room on them, decode TEs generate, and then prefill TEs."""
    async with tes(bus, je, p="prefill", d="decode", c="colocated") as te:
        te["c"].says = Overloaded("full")
        assert (await client.submit("r1")).te == "d"
        te["d"].says = Overloaded("full")
        assert (await client.submit("r2")).te == "p"
        te["p"].says = Overloaded("full")
        await asyncio.sleep(
            0.5
        )  # what was given is in their beats by now, which say that they are idle
        with pytest.raises(Overloaded):
            await client.submit("r3", prompt=LONG)
        assert [task.kind.value for task in te["p"].tasks] == ["generate", "prefill", "generate"]
        te["d"].says = "accepted"
        await asyncio.sleep(0.5)
        assert (await client.submit("r4", prompt=LONG)).te == "d"  # prefill is full: not split


async def test_the_prefill_te_decodes_where_nobody_else_can(
    bus: Bus, je: str, client: Client
) -> None:
    """Full decode TEs refuse, and what was prefilled goes back; if that refuses, too, the attempt has failed."""
    async with tes(bus, je, p="prefill", d="decode", e="decode") as te:
        te["d"].says = te["e"].says = Overloaded("full", retry_after_s=2.0)
        await client.submit("r1", prompt=LONG)
        await te["p"].handed(await asked(te["p"]))
        await eventually(lambda: len(te["p"].tasks) == 2)
        decode = te["p"].tasks[1]
        assert (decode.kind, decode.request.output) == (TaskKind.DECODE, [[7]])
        await eventually(lambda: moves(client) == ["p"])
        await te["p"].ended(decode, "length")
        await idle(bus, je)

        await client.submit("r2", prompt=LONG)
        await eventually(lambda: len(te["p"].tasks) == 3)
        te["p"].says = Overloaded("full", retry_after_s=1.0)
        await te["p"].handed(te["p"].tasks[2])
        await eventually(lambda: len(client.ends("r2")) == 1)
        (end,) = client.ends("r2")
        assert end.failure is not None
        assert (end.index, end.finish, end.failure.code) == (1, "failed", "overloaded")
        await idle(bus, je)


async def test_a_silent_decode_te_fails_the_attempt(bus: Bus, je: str, client: Client) -> None:
    """It may have the task: it is told to drop it, nobody else is asked, and the gateway is told to come again."""
    async with tes(bus, je, p="prefill", d="decode") as te:
        te["d"].says = "silence"
        await client.submit("r1", prompt=LONG)
        await te["p"].handed(await asked(te["p"]))
        await eventually(lambda: len(client.ends("r1")) == 1)
        (end,) = client.ends("r1")
        assert end.failure is not None
        assert (end.failure.code, end.failure.retry_after_s) == ("unavailable", 0.0)
        assert te["d"].cancels == [Cancel(request="r1", attempt=1)]
        assert len(te["p"].tasks) == 1
        # The next attempt keeps away from the suspect, and so is not split.
        assert (await client.submit("r1", prompt=LONG, output=[[7]], attempt=2)).te == "p"
        assert te["p"].tasks[1].kind is TaskKind.GENERATE


async def test_a_cancel_at_each_point(bus: Bus, je: str, client: Client) -> None:
    """While it is prefilled, while the second TE is being asked, and while that decodes: whoever has a part is told."""
    subject = bus.subjects.cancel(je)
    cancels = [Cancel(request=name, attempt=1) for name in ("r1", "r2", "r3")]
    async with tes(bus, je, p="prefill", d="decode") as te:
        await client.submit("r1", prompt=LONG)
        await bus.publish(subject, cancels[0])
        await eventually(lambda: te["p"].cancels == cancels[:1])
        await te["p"].handed(te["p"].tasks[0])  # it was done just then
        await eventually(lambda: te["p"].cancels == cancels[:1] * 2)
        await idle(bus, je)
        assert not te["d"].tasks

        te["d"].hold = asyncio.Event()
        await client.submit("r2", prompt=LONG)
        await te["p"].handed(te["p"].tasks[1])
        await asked(te["d"])
        await bus.publish(subject, cancels[1])
        await eventually(lambda: cancels[1] in te["p"].cancels)
        assert not te["d"].cancels
        te["d"].hold.set()
        await eventually(lambda: te["d"].cancels == cancels[1:2])

        await client.submit("r3", prompt=LONG)
        await te["p"].handed(te["p"].tasks[2])
        await eventually(lambda: len(moves(client)) == 2)
        await bus.publish(subject, cancels[2])
        await eventually(lambda: cancels[2] in te["p"].cancels and cancels[2] in te["d"].cancels)
        assert not client.ends("r2")


async def test_a_newer_attempt_ends_both_parts_of_the_older(
    bus: Bus, je: str, client: Client
) -> None:
    """The gateway came again: both TEs of the old pair are told, and what the first one says later is of no use."""
    async with tes(bus, je, p="prefill", d="decode") as te:
        await client.submit("r1", prompt=LONG)
        old = te["p"].tasks[0]
        await te["p"].handed(old)
        await asked(te["d"])
        await eventually(lambda: moves(client) == ["d"])
        assert (await client.submit("r1", prompt=LONG, output=[[7]], attempt=2)).te == "p"
        cancel = Cancel(request="r1", attempt=1)
        await eventually(lambda: te["p"].cancels == [cancel] and te["d"].cancels == [cancel])
        await te["p"].handed(old)
        await eventually(lambda: te["p"].cancels == [cancel] * 2)
        assert len(te["d"].tasks) == 1


async def test_what_nobody_asked_for_is_dropped(bus: Bus, je: str, client: Client) -> None:
    """Pages that were prefilled for a request this JE does not know are not held for it."""
    async with tes(bus, je, p="prefill") as te:
        request = client.request("r9", attempt=3)
        task = Task(task="t", job="j", je=je, kind=TaskKind.PREFILL, request=request)
        await te["p"].handed(task)
        await eventually(lambda: te["p"].cancels == [Cancel(request="r9", attempt=3)])


async def test_a_first_token_may_be_the_last(bus: Bus, je: str, client: Client) -> None:
    """A prefill task that ended its choice, or failed, leaves nothing to decode."""
    async with tes(bus, je, p="prefill", d="decode") as te:
        for number, finish in enumerate(("stop", "failed", "cancelled")):
            await client.submit(f"r{number}", prompt=LONG)
            await te["p"].ended(te["p"].tasks[number], finish)
            await idle(bus, je)
        assert not te["d"].tasks


async def test_the_prefill_te_dies(bus: Bus, je: str, client: Client) -> None:
    """Before it is done, its gateway comes again; afterwards the decode TE gets the task all the same."""
    async with tes(bus, je, p="prefill", d="decode", q="prefill") as te:
        te["q"].load["waiting_tokens"] = 9000
        te["d"].hold = asyncio.Event()
        await asyncio.sleep(0.3)
        await client.submit("r1", prompt=LONG)
        await client.submit("r2", prompt=LONG)
        first, second = te["p"].tasks
        await te["p"].handed(first)
        await asked(te["d"])
        await bus.publish(bus.subjects.down("te", "p"), Down(kind="te", id="p", reason="x"))
        await te["p"].handed(second)
        te["d"].hold.set()
        await eventually(lambda: moves(client) == ["d"])
        assert [task.request.request for task in te["d"].tasks] == ["r1"]
        assert (await status(bus, "scheduler", je))["active"] == 1


async def test_parked_requests_are_split_too(bus: Bus, je: str, client: Client) -> None:
    """A request that waited for TEs is split like any once both roles are up."""
    assert (await client.submit("r1", prompt=LONG)).te is None
    d, p = Te(bus, "d", role="decode", state="loading"), Te(bus, "p", role="prefill")
    p.load["state"] = "loading"
    async with d, p:
        d.says = Overloaded("full")
        d.load["state"] = "ready"
        await eventually(lambda: len(d.tasks) > 0)
        d.says = "accepted"
        p.load["state"] = "ready"
        # Whoever comes first: the pair, or the decode TE alone.
        await eventually(lambda: client.progress("r1")[-1] == "dispatched")
        if p.tasks:
            await p.handed(p.tasks[-1])
            await eventually(lambda: moves(client) == ["d"])


async def test_a_je_hands_over_before_it_leaves(nats: NatsServer, bus: Bus, client: Client) -> None:
    """On SIGTERM a JE waits for what is being prefilled, places it, and leaves with code 0."""
    await publish_model(bus)
    async with process("scheduler", nats, **ENV) as (child, je):
        await wait_ready(bus, "scheduler", je)
        async with tes(bus, je, p="prefill", d="decode") as te:
            await client.submit("r1", prompt=LONG)
            child.send_signal(signal.SIGTERM)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(child.wait(), 0.7)
            await te["p"].handed(te["p"].tasks[0])
            assert await asyncio.wait_for(child.wait(), 10) == 0
            assert (await asked(te["d"])).kind is TaskKind.DECODE
            await eventually(lambda: moves(client) == ["d"])
