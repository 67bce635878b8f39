"""Lines of batches at a real gateway: run like any request, once, in their own band, and dropped when unwanted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest

from services.gateway import lines as lines_module
from shared.bus import Bus
from shared.errors import DeadlineExceeded, Overloaded
from shared.job_messages import Line, LineDone
from shared.messages import Accepted, Band, Request
from tests.gateway.peers import MODEL, Peers
from tests.gateway.running import RunningGateway

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "What?"}], "max_tokens": 16}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are short."""
    monkeypatch.setattr(lines_module, "ROUND_S", 0.3)


def line(key: str = "batch_1-1", **more: Any) -> Line:
    """A chat, with other fields of its body."""
    return Line(
        key=key,
        tenant="alice",
        endpoint="/v1/chat/completions",
        body=orjson.dumps(BODY | more).decode(),
        deadline_ms=60_000,
    )


async def ask(bus: Bus, gateway: RunningGateway, asked: Line) -> LineDone:
    """What a JE does."""
    assert gateway.service is not None
    subject = bus.subjects.line(gateway.service.id)
    return await bus.request(subject, asked, LineDone, timeout_s=10)


async def test_a_line_is_answered_as_over_http(
    bus: Bus, gateway: RunningGateway, peers: Peers
) -> None:
    """A line gets the body that HTTP would have given, with its tokens counted, for its tenant, as batch work."""
    done = await _persistently(bus, gateway, line())

    assert done.status == 200
    body = orjson.loads(done.body)
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == peers.text
    usage = body["usage"]
    assert (done.prompt_tokens, done.output_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert done.cached_tokens == peers.cached
    [request] = peers.requests
    assert (request.tenant, request.band) == ("alice", Band.BATCH)


async def test_a_line_that_is_wrong_gets_the_status_it_would_over_http(
    bus: Bus, gateway: RunningGateway, peers: Peers
) -> None:
    """Faults of the line are answers: an unknown model, a wrong field, a stream, another endpoint."""
    wrong = {
        "batch_1-1": line(model="nobody"),
        "batch_1-2": line("batch_1-2", temperature="hot"),
        "batch_1-3": line("batch_1-3", stream=True),
    }
    statuses = [(await _persistently(bus, gateway, one)).status for one in wrong.values()]
    assert statuses == [404, 400, 400]
    assert peers.requests == []


async def test_a_line_without_time_does_not_get_the_gateways(
    bus: Bus, gateway: RunningGateway, peers: Peers
) -> None:
    """A line that comes with nothing left of its batch's time ends at once, whatever time other calls have."""
    peers.step_s = 0.05
    done = await ask(bus, gateway, replace(line(), deadline_ms=0))
    assert done.status == DeadlineExceeded.status


async def test_a_line_is_run_once_however_often_it_is_asked_for(
    bus: Bus, gateway: RunningGateway, peers: Peers
) -> None:
    """While it runs, and after it is done, the same key gets the one answer."""
    peers.step_s = 0.05
    first, second = await asyncio.gather(*(_persistently(bus, gateway, line()) for _ in range(2)))
    third = await _persistently(bus, gateway, line())
    assert first == second == third
    assert len(peers.requests) == 1
    assert (await _persistently(bus, gateway, line("batch_1-2"))).status == 200
    assert len(peers.requests) == 2


async def test_a_line_that_is_alone_is_always_taken(
    bus: Bus, start: Callable[..., Awaitable[RunningGateway]], peers: Peers
) -> None:
    """However little memory is set aside, a long line is run, or its batch would wait for it for ever."""
    gateway = await start(body_budget_bytes=400)
    assert (await _persistently(bus, gateway, line())).status == 200


async def test_answers_are_kept_within_bounds(
    bus: Bus, gateway: RunningGateway, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short answers cost more than their text: the oldest are let go, and run again if somebody asks."""
    monkeypatch.setattr(lines_module, "_KEPT_BYTES", 2500)
    for key in ("batch_1-1", "batch_1-2", "batch_1-2", "batch_1-1"):
        assert (await _persistently(bus, gateway, line(key))).status == 200
    assert len(peers.requests) == 3


async def _persistently(bus: Bus, gateway: RunningGateway, asked: Line) -> LineDone:
    while True:
        try:
            return await ask(bus, gateway, asked)
        except DeadlineExceeded:
            continue


async def test_a_line_that_nobody_asks_for_is_dropped(
    bus: Bus, gateway: RunningGateway, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JE that is told "not yet" and never comes back leaves no work behind."""
    monkeypatch.setattr(lines_module, "FORGOTTEN_S", 0.6)
    peers.step_s = 1.0
    with pytest.raises(DeadlineExceeded):
        await ask(bus, gateway, line())
    assert peers.cancels == []
    await peers.until(lambda: len(peers.cancels) > 0)


async def test_lines_leave_room_for_those_who_wait(
    bus: Bus, start: Callable[..., Awaitable[RunningGateway]], peers: Peers
) -> None:
    """Past their bound lines are refused, until one of those in hand is done."""
    gateway = await start(max_lines=3)
    go = asyncio.Event()

    async def late(request: Request) -> Accepted:
        await go.wait()
        return await peers.accept(request)

    peers.on_request = late
    held = [
        asyncio.create_task(_persistently(bus, gateway, line(f"batch_1-{number}")))
        for number in range(3)
    ]
    await peers.until(lambda: len(peers.requests) == 3)
    with pytest.raises(Overloaded):
        await ask(bus, gateway, line("batch_2-1"))
    go.set()
    assert [(await task).status for task in held] == [200] * 3
    assert (await _persistently(bus, gateway, line("batch_2-1"))).status == 200
