"""Job Executors as real processes on a real bus; the test plays the TEs and the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import pytest

from shared.bus import Bus
from shared.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from shared.messages import Cancel, Down, Sampling, StatusQuery, StatusReply, TaskEnded
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


@pytest.fixture
async def je(nats: NatsServer, bus: Bus) -> AsyncIterator[str]:
    """A running JE with one model in the catalogue; its id."""
    await publish_model(bus)
    env = {"DEEPFLOW_PARK_MAX_REQUESTS": "3", "DEEPFLOW_TASK_TIMEOUT_S": "1.5"}  # a busy machine's
    async with process("scheduler", nats, **env) as (_, name):
        await wait_ready(bus, "scheduler", name)
        yield name


@pytest.fixture
async def client(bus: Bus) -> AsyncIterator[Client]:
    """A gateway."""
    async with Client(bus) as client:
        yield client


async def known(bus: Bus, je: str, *tes: str) -> None:
    """Waits until the JE knows these TEs as ready."""

    async def holds() -> bool:
        seen = (await status(bus, "scheduler", je))["tes"]
        return {te["id"] for te in seen if te["state"] == "ready"} >= set(tes)

    await eventually(holds)


async def test_least_loaded_first_and_explained(bus: Bus, je: str, client: Client) -> None:
    """A request goes to the TE that would answer first, as one GENERATE task, and the status says why."""
    async with Te(bus, "te-busy", waiting_tokens=5000) as busy, Te(bus, "te-idle") as idle:
        await known(bus, je, "te-busy", "te-idle")
        accepted = await client.submit("r1")
        assert (accepted.te, accepted.by, accepted.attempt) == ("te-idle", je, 1)
        (task,) = idle.tasks
        assert (task.kind, task.je, task.request.prompt) == ("generate", je, [1, 2, 3])
        assert busy.tasks == []
        decision = (await status(bus, "scheduler", je))["decisions"][0]
        assert decision["chosen"] == "te-idle"
        assert [c["te"] for c in decision["candidates"]] == ["te-idle", "te-busy"]
        assert decision["answers"] == [["te-idle", "accepted"]]
        assert 4000 < decision["candidates"][1]["queued_tokens"] <= 5000


async def test_a_placement_can_be_asked_for(bus: Bus, je: str, client: Client) -> None:
    """The verb `placement` of all JEs tells of one request what was decided and, once it is over, what came of it."""
    async with Te(bus, "te-a") as te:
        await known(bus, je, "te-a")
        await client.submit("r1")
        await te.ended(te.tasks[0], "stop")

        async def told() -> bool:
            query = StatusQuery(verb="placement", argument="r1")
            subject = bus.subjects.status("scheduler", "all")
            reply = await bus.request(subject, query, StatusReply, timeout_s=5)
            [decision] = json.loads(reply.body)["decisions"]
            assert (decision["request"], decision["chosen"]) == ("r1", "te-a")
            return decision.get("actual", {}).get("finish") == "stop"

        await eventually(told)


async def test_a_burst_is_spread(bus: Bus, je: str, client: Client) -> None:
    """Requests that come within one beat see each other's work: two idle TEs share them."""
    async with Te(bus, "te-a") as a, Te(bus, "te-b") as b:
        await known(bus, je, "te-a", "te-b")
        await asyncio.gather(*(client.submit(f"r{n}") for n in range(20)))
        assert len(a.tasks) + len(b.tasks) == 20
        assert min(len(a.tasks), len(b.tasks)) >= 5


async def test_a_full_te_passes_the_request_on(bus: Bus, je: str, client: Client) -> None:
    """On `overloaded` the next candidate is asked; TEs the client wants to avoid come last."""
    async with (
        Te(bus, "te-a") as a,
        Te(bus, "te-b", waiting_tokens=1000) as b,
        Te(bus, "te-c") as c,
    ):
        await known(bus, je, "te-a", "te-b", "te-c")
        a.says = Overloaded("full")
        accepted = await client.submit("r1", avoid=["te-c"])
        assert accepted.te == "te-b"
        assert (len(a.tasks), len(b.tasks), len(c.tasks)) == (1, 1, 0)


async def test_three_are_tried_then_429(bus: Bus, je: str, client: Client) -> None:
    """When three TEs are full the client gets 429 with the shortest wait they named; a fourth is not asked."""
    async with (
        Te(bus, "te-1") as one,
        Te(bus, "te-2", waiting_tokens=1000) as two,
        Te(bus, "te-3", waiting_tokens=2000) as three,
        Te(bus, "te-4", waiting_tokens=3000) as four,
    ):
        await known(bus, je, "te-1", "te-2", "te-3", "te-4")
        for te, wait_s in ((one, 9.0), (two, 4.0), (three, 6.0), (four, 2.0)):
            te.says = Overloaded("full", retry_after_s=wait_s)
        with pytest.raises(Overloaded) as refused:
            await client.submit("r1")
        assert refused.value.retry_after_s == 4.0
        assert [len(te.tasks) for te in (one, two, three, four)] == [1, 1, 1, 0]
        assert client.frames == []


async def test_a_te_nobody_answers_for_is_skipped(bus: Bus, je: str, client: Client) -> None:
    """A TE whose subject has no listener costs one round trip, and the request goes to the next."""
    gone = Te(bus, "te-gone")
    gone.serves = False
    async with gone, Te(bus, "te-b", waiting_tokens=1000):
        await known(bus, je, "te-gone", "te-b")
        assert (await client.submit("r1")).te == "te-b"


async def test_silence_is_ambiguous(bus: Bus, je: str, client: Client) -> None:
    """A TE that leaves a task unanswered is told to drop it, the gateway is told to come again, and then it is last."""
    async with Te(bus, "te-a") as a, Te(bus, "te-b", waiting_tokens=1000) as b:
        await known(bus, je, "te-a", "te-b")
        a.says = "silence"
        with pytest.raises(Unavailable) as refused:
            await client.submit("r1")
        assert refused.value.retry_after_s == 0.0
        assert b.tasks == []  # the same attempt is never given to two
        await eventually(lambda: a.cancels == [Cancel(request="r1", attempt=1)])
        assert (await client.submit("r1", attempt=2)).te == "te-b"


async def test_refusals_of_the_request_itself(bus: Bus, je: str, client: Client) -> None:
    """Unknown models are 404, late requests 504, unknown kinds 400, and a TE's own 400 reaches the client as it is."""
    with pytest.raises(ModelNotFound) as unknown:
        await client.submit("r1", model="no such/model")
    assert "no such/model" in unknown.value.message
    with pytest.raises(DeadlineExceeded):
        await client.submit("r2", deadline_ms=0)
    with pytest.raises(InvalidRequest) as kind:
        await client.submit("r3", kind="telepathy")
    assert kind.value.param == "kind"
    async with Te(bus, "te-a") as te, Te(bus, "te-b", waiting_tokens=1000) as other:
        await known(bus, je, "te-a", "te-b")
        te.says = InvalidRequest("too long", param="messages")
        with pytest.raises(InvalidRequest, match="too long") as refused:
            await client.submit("r4")
        assert refused.value.param == "messages"
        assert other.tasks == []
    assert client.frames == []


async def test_parked_until_a_te_appears(bus: Bus, je: str, client: Client) -> None:
    """Without a TE requests park, the client hears of it at once, and they are dispatched in order when one is up."""
    for name in ("r1", "r2", "r3"):
        accepted = await client.submit(name)
        assert (accepted.te, accepted.by) == (None, je)
        await eventually(lambda name=name: client.progress(name) == ["parked"])  # type: ignore[misc]
    with pytest.raises(Overloaded) as full:
        await client.submit("r4")
    assert full.value.retry_after_s is not None
    assert full.value.retry_after_s >= 1.0
    assert (await client.submit("r1")).te is None  # the same attempt again: the same answer
    await eventually(lambda: client.progress("r1") == ["parked", "parked"])  # about once a second
    async with Te(bus, "te-a", state="loading") as te:
        await asyncio.sleep(0.5)
        assert te.tasks == []
        te.load["state"] = "ready"
        await eventually(lambda: client.progress("r3")[-1] == "dispatched")
        assert [task.request.request for task in te.tasks] == ["r1", "r2", "r3"]
        assert te.tasks[0].request.deadline_ms < 60_000 - 500
        assert te.tasks[0].request.park_ms < 30_000 - 500
        assert client.ends("r1") == []
        assert (await status(bus, "scheduler", je))["parked"] == 0


async def test_a_parked_request_fails_when_its_budget_ends(
    bus: Bus, je: str, client: Client
) -> None:
    """One failed delta per open choice: 503 with a wait past the park budget, 504 past the deadline."""
    sampling = Sampling(max_tokens=10, seed=1, n=3)
    await client.submit(
        "r1", park_ms=300, sampling=sampling, output=[[5, 6], [], [7]], ended=[2], attempt=4
    )
    await client.submit("r2", deadline_ms=300)
    await eventually(lambda: bool(client.ends("r1")) and bool(client.ends("r2")))
    first, second = client.ends("r1")
    assert [(d.choice, d.index, d.attempt) for d in (first, second)] == [(0, 2, 4), (1, 0, 4)]
    for delta in (first, second):
        assert delta.finish == "failed"
        assert delta.failure is not None
        assert delta.failure.code == "model_not_ready"
        assert delta.failure.retry_after_s is not None
        assert delta.failure.retry_after_s > 0
    (late,) = client.ends("r2")
    assert late.failure is not None
    assert late.failure.code == "deadline_exceeded"
    with pytest.raises(Unavailable):
        await client.submit("r3", park_ms=0)


async def test_cancel_while_parked(bus: Bus, je: str, client: Client) -> None:
    """A cancel to the JE's own name ends a parked request once, unseen by any TE; a cancelled choice is left out."""
    await client.submit("r1")
    await client.submit("r2", sampling=Sampling(max_tokens=4, seed=1, n=2))
    subject = bus.subjects.cancel(je)
    await bus.publish(subject, Cancel(request="r1", attempt=1))
    await bus.publish(subject, Cancel(request="r1", attempt=1))
    await bus.publish(subject, Cancel(request="r2", attempt=1, choice=0))
    await eventually(lambda: [d.finish for d in client.ends("r1")] == ["cancelled"])
    async with Te(bus, "te-a") as te:
        await eventually(lambda: len(te.tasks) == 1)
        assert [(t.request.request, t.request.ended) for t in te.tasks] == [("r2", [0])]
        # Once it runs, the JE passes a cancel on to the TE.
        await eventually(lambda: client.progress("r2")[-1] == "dispatched")
        await bus.publish(subject, Cancel(request="r2", attempt=1))
        await eventually(lambda: [c.request for c in te.cancels] == ["r2"])
    assert len(client.ends("r1")) == 1


async def test_the_newest_attempt_wins(bus: Bus, je: str, client: Client) -> None:
    """A newer attempt ends the older one, parked or running; an older one is refused."""
    await client.submit("r1", attempt=1)
    await client.submit("r1", attempt=2)
    await eventually(
        lambda: [(d.attempt, d.finish) for d in client.ends("r1")] == [(1, "cancelled")]
    )
    with pytest.raises(Unavailable):
        await client.submit("r1", attempt=1)
    async with Te(bus, "te-a") as te:
        await eventually(lambda: [t.request.attempt for t in te.tasks] == [2])
        await eventually(lambda: client.progress("r1")[-1] == "dispatched")
        assert (await client.submit("r1", attempt=3)).te == "te-a"
        await eventually(lambda: te.cancels == [Cancel(request="r1", attempt=2)])
        ended = TaskEnded(
            task="r1.3.0",
            request="r1",
            attempt=3,
            te="te-a",
            finish="stop",
            prompt_tokens=3,
            cached_tokens=0,
            output_tokens=2,
        )
        await bus.publish(bus.subjects.events(je), ended)

        async def forgotten() -> bool:
            return (await status(bus, "scheduler", je))["active"] == 0

        await eventually(forgotten)


async def test_a_silent_gateways_requests_are_dropped(bus: Bus, je: str, client: Client) -> None:
    """What a gateway parked is dropped when its beats stop, and no TE gets it."""
    await client.beat()
    await client.submit("r1")
    await eventually(lambda: client.progress("r1") == ["parked"])

    async def dropped() -> bool:
        return (await status(bus, "scheduler", je))["parked"] == 0

    await eventually(dropped)
    assert client.ends("r1") == []
    async with Te(bus, "te-a") as te:
        await known(bus, je, "te-a")
        await client.submit("r2")
        assert [task.request.request for task in te.tasks] == ["r2"]


async def test_dead_and_draining_tes_get_nothing(bus: Bus, je: str, client: Client) -> None:
    """A `Down` counts at once, although the TE's last beats still come; a draining TE takes nothing new."""
    async with Te(bus, "te-a") as a, Te(bus, "te-b", waiting_tokens=1000) as b:
        await known(bus, je, "te-a", "te-b")
        await bus.publish(bus.subjects.down("te", "te-a"), Down(kind="te", id="te-a", reason="x"))
        await bus.flush()
        assert (await client.submit("r1")).te == "te-b"
        b.load["state"] = "draining"
        await asyncio.sleep(0.3)
        assert (await client.submit("r2")).te is None
        assert a.tasks == []


async def test_drain_hands_parked_requests_back(nats: NatsServer, bus: Bus, client: Client) -> None:
    """On SIGTERM a JE fails what it parked so that gateways resubmit at once, and leaves with code 0."""
    await publish_model(bus)
    async with process("scheduler", nats) as (child, name):
        await wait_ready(bus, "scheduler", name)
        await client.submit("r1")
        child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(child.wait(), 10) == 0
        (end,) = client.ends("r1")
        assert end.failure is not None
        assert (end.finish, end.failure.code, end.failure.retry_after_s) == (
            "failed",
            "unavailable",
            0.0,
        )
    with pytest.raises(Unavailable):
        await client.submit("r2")


async def test_replicas_share_and_survive_each_other(
    nats: NatsServer, bus: Bus, client: Client
) -> None:
    """Two JEs both take requests; kill -9 of one loses nothing of the other, parked requests included."""
    await publish_model(bus)
    async with (
        process("scheduler", nats) as (one, first),
        process("scheduler", nats) as (_, second),
    ):
        for name in (first, second):
            await wait_ready(bus, "scheduler", name)
        by = {f"r{n}": (await client.submit(f"r{n}")).by for n in range(30)}
        assert set(by.values()) == {first, second}
        os.kill(one.pid, signal.SIGKILL)
        await one.wait()
        async with Te(bus, "te-a") as te:
            kept = {name for name, je in by.items() if je == second}
            await eventually(lambda: {t.request.request for t in te.tasks} == kept)
            # What the dead one held, its gateway sends again: to whoever is there.
            for name in by.keys() - kept:
                accepted = await client.submit(name, attempt=2)
                assert (accepted.by, accepted.te) == (second, "te-a")
            assert len(te.tasks) == 30


async def test_the_last_view_stands_while_the_bus_is_away(
    nats: NatsServer, bus: Bus, je: str, client: Client
) -> None:
    """kill -9 and restart of nats-server: parked requests stay, and are dispatched when a TE beats again."""
    await client.submit("r1")
    await asyncio.to_thread(nats.restart)
    await eventually(lambda: bus.connected)
    async with Te(bus, "te-a") as te:
        await eventually(lambda: [task.request.request for task in te.tasks] == ["r1"])
        await known(bus, je, "te-a")
        assert (await client.submit("r2", model=MODEL)).te == "te-a"
