"""The bus on a real server: typed answers, failures as errors, restarts, tables."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shared import errors
from shared.bus import Bus, RawMessage
from shared.config import BusSettings
from shared.messages import Accepted, Beat, Cancel, Failure, Replay, StatusQuery, StatusReply
from tests.nats_server import NatsServer


async def test_a_request_gets_its_typed_answer(bus: Bus) -> None:
    """A served request is answered with the handler's message."""

    async def accept(cancel: Cancel) -> Accepted:
        return Accepted(request=cancel.request, attempt=cancel.attempt, by="test")

    await bus.serve("test.a", (Cancel,), accept)
    answer = await bus.request("test.a", Cancel(request="r", attempt=3), Accepted, timeout_s=5)

    assert answer == Accepted(request="r", attempt=3, by="test")


async def test_a_failure_is_raised_as_its_error(bus: Bus) -> None:
    """An error the handler raises on purpose reaches the caller as the same class with its fields."""

    async def refuse(cancel: Cancel) -> Accepted:
        raise errors.Overloaded("full", param="te", retry_after_s=2.5)

    await bus.serve("test.a", (Cancel,), refuse)
    with pytest.raises(errors.Overloaded, match="full") as caught:
        await bus.request("test.a", Cancel(request="r", attempt=0), Accepted, timeout_s=5)

    assert (caught.value.param, caught.value.retry_after_s) == ("te", 2.5)


async def test_a_crashing_handler_answers_internal(bus: Bus) -> None:
    """An unexpected exception becomes Failure(internal), and the subscription lives on."""

    async def crash(cancel: Cancel) -> Accepted:
        raise ZeroDivisionError

    await bus.serve("test.a", (Cancel,), crash)
    for _ in range(2):
        with pytest.raises(errors.Internal):
            await bus.request("test.a", Cancel(request="r", attempt=0), Accepted, timeout_s=5)


async def test_an_undecodable_request_is_answered(bus: Bus) -> None:
    """Hostile bytes to a served subject get a typed Failure."""

    async def accept(cancel: Cancel) -> Accepted:
        raise AssertionError("must not be reached")

    await bus.serve("test.a", (Cancel,), accept)
    with pytest.raises(errors.InvalidRequest, match=r"Replay"):
        await bus.request("test.a", Replay(request="r", attempt=0, have=[]), Accepted, timeout_s=5)
    assert bus.num_undecodable == 1


async def test_nobody_there_is_unavailable_and_silence_a_deadline(bus: Bus) -> None:
    """No subscriber gives Unavailable at once, a silent one DeadlineExceeded after the time-out."""
    with pytest.raises(errors.Unavailable):
        await bus.request("test.none", Cancel(request="r", attempt=0), Accepted, timeout_s=5)

    await bus.listen("test.silent", (Cancel,), lambda cancel: None)
    with pytest.raises(errors.DeadlineExceeded):
        await bus.request("test.silent", Cancel(request="r", attempt=0), Accepted, timeout_s=0.1)


async def test_an_answer_that_cannot_be_sent_is_a_failure(bus: Bus) -> None:
    """An answer too large for the bus, or none of our messages, does not leave the caller to wait in vain."""

    async def much(cancel: Cancel) -> Failure:
        return Failure(code="x", message="y" * 9_000_000)

    async def nothing(cancel: Cancel) -> None:
        return None

    await bus.serve("test.much", (Cancel,), much)
    await bus.serve("test.nothing", (Cancel,), nothing)
    with pytest.raises(errors.TooLarge):
        await bus.request("test.much", Cancel(request="r", attempt=0), Accepted, timeout_s=5)
    with pytest.raises(errors.Internal):
        await bus.request("test.nothing", Cancel(request="r", attempt=0), Accepted, timeout_s=5)


async def test_requests_past_the_limit_are_refused(bus: Bus) -> None:
    """With `limit` requests in flight, the next is answered overloaded at once."""
    release = asyncio.Event()

    async def wait(cancel: Cancel) -> Accepted:
        await release.wait()
        return Accepted(request=cancel.request, attempt=0, by="test")

    await bus.serve("test.a", (Cancel,), wait, limit=1)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(
            bus.request("test.a", Cancel(request="1", attempt=0), Accepted, timeout_s=5)
        )
        await asyncio.sleep(0.05)
        with pytest.raises(errors.Overloaded):
            await bus.request("test.a", Cancel(request="2", attempt=0), Accepted, timeout_s=5)
        release.set()

    assert first.result().request == "1"


async def test_drain_answers_what_is_in_flight(bus: Bus) -> None:
    """A drained subscription takes nothing new and finishes what it has."""

    async def slow(cancel: Cancel) -> Accepted:
        await asyncio.sleep(0.1)
        return Accepted(request=cancel.request, attempt=0, by="test")

    served = await bus.serve("test.a", (Cancel,), slow)
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(
                bus.request("test.a", Cancel(request=str(i), attempt=0), Accepted, timeout_s=5)
            )
            for i in range(5)
        ]
        await asyncio.sleep(0.03)
        await served.drain()

    assert [task.result().request for task in asked] == list("01234")
    with pytest.raises(errors.Unavailable):
        await bus.request("test.a", Cancel(request="r", attempt=0), Accepted, timeout_s=5)


async def test_drain_waits_no_longer_than_the_grace(nats: NatsServer) -> None:
    """A handler that never ends is cancelled, so that the service can go on stopping."""
    bus = await Bus.connect(BusSettings(url=nats.url, grace_s=0.1), name="test")
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(cancel: Cancel) -> Accepted:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError("nobody sets that event")

    served = await bus.serve("test.a", (Cancel,), hang)
    await bus.publish("test.a", Cancel(request="r", attempt=0))
    async with asyncio.timeout(10):
        await started.wait()
        await served.drain()
        await cancelled.wait()
    await bus.close()


async def test_messages_arrive_in_order_and_bad_ones_are_counted(bus: Bus) -> None:
    """A listener sees messages in order; what it cannot decode, or stumbles over, does not end it."""
    seen: list[int] = []

    def take(cancel: Cancel) -> None:
        if cancel.attempt == 1:
            raise ZeroDivisionError
        seen.append(cancel.attempt)

    await bus.listen("test.a", (Cancel,), take)
    await bus.publish_raw("test.a", b"\xc1")
    for attempt in range(5):
        await bus.publish("test.a", Cancel(request="r", attempt=attempt))
    await bus.flush()
    await asyncio.sleep(0.05)

    assert seen == [0, 2, 3, 4]
    assert bus.num_undecodable == 1


async def test_after_a_flush_the_server_knows_what_is_served(bus: Bus, nats: NatsServer) -> None:
    """Whoever is asked over another connection right after its flush is there, each time."""
    other = await Bus.connect(BusSettings(url=nats.url, grace_s=5), name="other")

    async def echo(query: StatusQuery) -> StatusQuery:
        return query

    for number in range(100):
        await bus.serve(f"test.{number}", (StatusQuery,), echo)
        await bus.flush()
        await other.request(f"test.{number}", StatusQuery(), StatusQuery, timeout_s=5)
    await other.close()


async def test_gather_takes_every_answer(bus: Bus) -> None:
    """All services answer one question."""

    async def answer(query: StatusQuery) -> StatusReply:
        return StatusReply(kind="x", id="y", pid=1, body="{}")

    for _ in range(3):
        await bus.serve("test.a", (StatusQuery,), answer)
    answers = await bus.gather("test.a", StatusQuery(), StatusReply, wait_s=0.3)

    assert len(answers) == 3


async def test_raw_messages_carry_their_reply_subject(bus: Bus) -> None:
    """A producer's bytes arrive as they are, and past the limit `refuse` hears of them."""
    heard: list[RawMessage] = []
    refused: list[RawMessage] = []
    release = asyncio.Event()

    async def take(message: RawMessage) -> None:
        heard.append(message)
        await release.wait()

    async def refuse(message: RawMessage) -> None:
        refused.append(message)

    await bus.serve_raw("test.a", take, limit=1, refuse=refuse)
    await bus.publish_raw("test.a", b"one", reply="somewhere")
    await bus.publish_raw("test.a", b"two")
    await bus.flush()
    await asyncio.sleep(0.05)
    release.set()

    assert heard == [RawMessage("test.a", b"one", "somewhere")]
    assert [message.data for message in refused] == [b"two"]


async def test_a_message_past_max_payload_is_too_large(bus: Bus) -> None:
    """A message the server would refuse is refused before it is sent."""
    with pytest.raises(errors.TooLarge):
        await bus.publish("test.a", Failure(code="x", message="y" * 9_000_000))


async def test_the_bus_survives_a_server_restart(bus: Bus, nats: NatsServer) -> None:
    """After kill -9 and restart the callbacks fire, subscriptions work, and buffered messages arrive."""
    events: list[str] = []
    seen: list[str] = []
    bus.on_disconnect(
        lambda: 1 // 0
    )  # a bug in one callback ends neither the others nor the reconnecting
    bus.on_disconnect(lambda: events.append("lost"))
    bus.on_reconnect(lambda: events.append("back"))
    await bus.listen("test.a", (Beat,), lambda beat: seen.append(beat.id))
    await bus.flush()
    nats.kill()
    async with asyncio.timeout(10):
        while not events:
            await asyncio.sleep(0.01)
        await bus.publish("test.a", Beat(kind="te", id="buffered"))
        assert not bus.connected
        with pytest.raises(errors.Unavailable, match="away"):
            await bus.table("models")
        nats.start()
        while not seen:
            await asyncio.sleep(0.01)

    assert events == ["lost", "back"]
    assert seen == ["buffered"]


async def test_a_table_holds_messages(bus: Bus, nats: NatsServer) -> None:
    """Entries are created once, put, read, listed, deleted, and survive a server restart; keys may be any text."""
    table = await bus.table("models")
    beat = Beat(kind="te", id="x")

    assert await table.get("org/name v1", Beat) is None
    assert await table.all(Beat) == {}
    assert await table.create("org/name v1", beat)
    assert not await table.create("org/name v1", Beat(kind="te", id="y"))
    assert await table.get("org/name v1", Beat) == beat
    await table.put("second", Beat(kind="te", id="z"))
    nats.restart()
    table = await bus.table("models")
    assert set(await table.all(Beat)) == {"org/name v1", "second"}
    await table.delete("second")
    assert set(await table.all(Beat)) == {"org/name v1"}
    assert await table.get("second", Beat) is None


@pytest.mark.service
async def test_a_server_that_lacks_something_is_refused_by_name(tmp_path: Path) -> None:
    """A small max_payload is refused at connect, naming the setting."""
    server = NatsServer(tmp_path, extra="max_payload: 1MB")
    server.start()
    try:
        with pytest.raises(errors.Unavailable, match="max_payload"):
            await Bus.connect(BusSettings(url=server.url), name="test")
    finally:
        server.stop()


async def test_a_drain_ends_with_the_server(nats: NatsServer) -> None:
    """What waits for the server's word when it dies goes on without it."""
    bus = await Bus.connect(BusSettings(url=nats.url, grace_s=5), name="test")
    served = await bus.listen("test.a", (Beat,), lambda beat: None)
    nats.pause()  # it neither answers nor goes away
    async with asyncio.timeout(5):
        async with asyncio.TaskGroup() as group:
            group.create_task(served.drain())
            flushed = group.create_task(asyncio.wait({asyncio.ensure_future(bus.flush())}))
            await asyncio.sleep(0.1)
            nats.kill()
        (future,) = flushed.result()[0]
        assert isinstance(future.exception(), errors.Unavailable)
        await bus.close()


async def test_a_bus_is_closed_while_the_server_is_away(nats: NatsServer) -> None:
    """Closing succeeds, and takes no longer than with a server."""
    bus = await Bus.connect(BusSettings(url=nats.url, grace_s=5), name="test")
    served = await bus.listen("test.a", (Beat,), lambda beat: None)
    nats.kill()
    async with asyncio.timeout(10):
        while bus.connected:
            await asyncio.sleep(0.01)
        await bus.publish("test.a", Beat(kind="te", id="never sent"))
        await served.drain()
        await bus.close()
        await bus.close()


@pytest.mark.service
async def test_what_a_user_may_not_do_is_refused_aloud(tmp_path: Path) -> None:
    """A wrong password is refused at once; a forbidden subject is counted, and the connection lives on."""
    allowed = 'publish: "good", subscribe: ["good", "_INBOX.>"]'
    server = NatsServer(
        tmp_path,
        extra=f"authorization {{ users: [{{ user: me, password: x, permissions: {{ {allowed} }} }}] }}",
    )
    server.start()
    try:
        async with asyncio.timeout(10):
            with pytest.raises(errors.Unavailable, match="refuses user 'me'"):
                await Bus.connect(BusSettings(url=server.url, user="me", password="y"), name="test")
        bus = await Bus.connect(BusSettings(url=server.url, user="me", password="x"), name="test")
        seen: list[str] = []
        await bus.listen("good", (Beat,), lambda beat: seen.append(beat.id))
        await bus.listen("bad", (Beat,), lambda beat: seen.append(beat.id))
        for subject in ("bad", "good"):
            await bus.publish(subject, Beat(kind="te", id=subject))
        async with asyncio.timeout(10):
            while not seen or bus.num_refused < 2:
                await asyncio.sleep(0.01)
        assert (seen, bus.num_refused) == (["good"], 2)
        assert not bus.closed.is_set()
        await bus.close()
    finally:
        server.stop()
