"""A stream survives what happens behind the gateway: lost frames, dead and hung TEs, dead JEs, a restarted bus."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import psutil
import pytest

from services.gateway import delivery
from shared.errors import Unavailable
from shared.messages import Accepted, Beat, Delta, Down, Failure, Progress, Request, TeBeat
from tests.gateway.peers import MODEL, Peers
from tests.gateway.running import RunningGateway
from tests.nats_server import NatsServer

HELLO = [{"role": "user", "content": "Hello"}]


async def chat(http: aiohttp.ClientSession, **fields: Any) -> tuple[str, list[str]]:
    """The text of a streamed chat, and its comments. The stream must end as a stream does."""
    body = {"model": MODEL, "messages": HELLO, "stream": True, **fields}
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        lines = [line.decode().strip() async for line in response.content]
    events = [line[6:] for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [orjson.loads(event)["choices"][0] for event in events[:-1]]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return text, [line[2:] for line in lines if line.startswith(": ")]


@pytest.fixture
async def other(peers: Peers) -> AsyncIterator[Peers]:
    """A second TE, which the JE of `peers` may choose."""
    second = Peers(peers.bus, peers.tokenizer, model="other")
    second.te, second.je = "te-2", "scheduler-2"
    await second.start()
    yield second
    await second.stop()


async def test_lost_frames_are_replayed(http: aiohttp.ClientSession, peers: Peers) -> None:
    """Frames lost in the middle are asked for at once; the text is whole."""
    peers.step_s = 0.01
    peers.lose = lambda step, delta: step in (2, 3, 7)
    assert (await chat(http))[0] == peers.text
    assert peers.replays


async def test_a_lost_end_is_asked_for(
    http: aiohttp.ClientSession, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost last frame leaves silence; the TE is asked, and the stream ends."""
    monkeypatch.setattr(delivery, "PROBE_S", (0.3, 8.0))
    peers.lose = lambda step, delta: delta.finish is not None
    assert (await chat(http))[0] == peers.text
    assert len(peers.requests) == 1


async def test_a_declared_death_resubmits(
    http: aiohttp.ClientSession, peers: Peers, other: Peers
) -> None:
    """When a TE is declared dead its request goes on elsewhere, with the tokens so far and the same seed."""
    peers.step_s = 0.01
    half = len(peers.ids()) // 2

    async def serve(request: Request) -> Accepted:
        if request.attempt == 1:
            peers.spawn(die(request))
            return peers.accepted(request)
        return await other.accept(request)

    async def die(request: Request) -> None:
        await peers.generate(request, end=half)
        down = Down(kind="te", id=peers.te, reason="killed")
        await peers.bus.publish(peers.bus.subjects.down("te", peers.te), down)

    peers.on_request = serve
    assert (await chat(http))[0] == peers.text
    first, second = peers.requests
    assert (second.attempt, second.output) == (2, [peers.ids()[:half]])
    assert second.avoid == [peers.te]
    assert second.sampling == first.sampling
    assert second.prompt == first.prompt


async def test_a_silent_te_is_given_up(
    http: aiohttp.ClientSession, peers: Peers, other: Peers
) -> None:
    """A TE that stops beating counts as dead after 1.5 s, and one that beats without progress does, too."""

    async def serve(request: Request) -> Accepted:
        if request.attempt == 1:
            peers.spawn(peers.generate(request, end=3))
            peers.silence()
            return peers.accepted(request)
        return await other.accept(request)

    peers.on_request = serve
    assert (await chat(http))[0] == peers.text
    assert len(peers.requests) == 2
    peers.requests.clear()

    async def hang(request: Request) -> Accepted:
        if request.attempt == 1:
            peers.spawn(peers.generate(request, end=3))
            peers.spawn(beat_without_progress())
            return peers.accepted(request)
        return await other.accept(request)

    async def beat_without_progress() -> None:
        for number in range(100):
            beat = TeBeat(
                id=peers.te, model=MODEL, pod="p", state="ready", progress_ms=1600 + number
            )
            await peers.bus.publish(peers.bus.subjects.beat("te", peers.te), beat)
            await asyncio.sleep(0.1)

    peers.on_request = hang
    assert (await chat(http))[0] == peers.text
    assert len(peers.requests) == 2


async def test_a_failed_attempt_is_resubmitted(http: aiohttp.ClientSession, peers: Peers) -> None:
    """A TE that gives up, as it does when it drains, costs a pause and not the stream."""

    async def serve(request: Request) -> Accepted:
        if request.attempt == 1:
            peers.spawn(give_up(request))
            return peers.accepted(request)
        return await peers.accept(request)

    async def give_up(request: Request) -> None:
        await peers.generate(request, end=2)
        failed = Delta(
            request=request.request,
            attempt=1,
            choice=0,
            index=2,
            ids=[],
            finish="failed",
            failure=Failure(code="unavailable", message="draining"),
        )
        await peers.send(request, [failed])

    peers.on_request = serve
    assert (await chat(http))[0] == peers.text


async def test_a_silent_je_is_asked_again(
    http: aiohttp.ClientSession, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JE that dies with the question unanswered costs a new attempt; the old one's tokens are stale."""
    monkeypatch.setattr(delivery, "SUBMIT_TIMEOUT_S", (0.5, 10.0))

    async def serve(request: Request) -> Accepted:
        if request.attempt == 1:
            await asyncio.sleep(1)
        return await peers.accept(request)

    peers.on_request = serve
    assert (await chat(http))[0] == peers.text
    assert [request.attempt for request in peers.requests] == [1, 2]


async def test_parked_requests_tell_and_survive_their_je(
    http: aiohttp.ClientSession, peers: Peers
) -> None:
    """While no TE is up the stream says so; when the JE that parks the request dies, another takes it."""

    async def serve(request: Request) -> Accepted:
        if request.attempt > 1:
            peers.spawn(dispatch(request))
        else:
            peers.spawn(beat_for_a_while())
        return peers.accepted(request, te=None)

    async def beat_for_a_while() -> None:
        beat = Beat(kind="scheduler", id=peers.je)
        for _ in range(3):
            await peers.bus.publish(peers.bus.subjects.beat("scheduler", peers.je), beat)
            await asyncio.sleep(0.1)

    async def dispatch(request: Request) -> None:
        progress = Progress(
            source=peers.je, request=request.request, attempt=2, state="dispatched", te=peers.te
        )
        await peers.bus.publish(peers.bus.subjects.tokens(request.client), progress)
        await peers.generate(request)

    peers.on_request = serve
    text, comments = await chat(http)
    assert text == peers.text
    assert "queued" in comments
    assert [request.attempt for request in peers.requests] == [1, 2]
    assert any(cancel.attempt == 1 for cancel in peers.cancels)


async def test_no_capacity_is_503(nats: NatsServer, cache: Any, peers: Peers) -> None:
    """Without any TE a call fails as unavailable once its park budget is over, streaming or not."""

    async def nobody(request: Request) -> Accepted:
        raise Unavailable("no replica")

    peers.on_request = nobody
    gateway = RunningGateway(nats.url, cache, park_s=0.3)
    await gateway.start()
    async with aiohttp.ClientSession(gateway.url) as http:
        for stream in (False, True):
            body = {"model": MODEL, "messages": HELLO, "stream": stream}
            async with http.post("/v1/chat/completions", json=body) as response:
                assert response.status == 503
    assert await gateway.stop() == 0


async def test_the_deadline_ends_a_stream(nats: NatsServer, cache: Any, peers: Peers) -> None:
    """A request that never ends is ended at its deadline: 504, or an error event, and its TE is told."""
    peers.step_s = 0.2
    peers.text = "word " * 80
    gateway = RunningGateway(nats.url, cache, deadline_s=0.5)
    await gateway.start()
    async with aiohttp.ClientSession(gateway.url) as http:
        body = {"model": MODEL, "messages": HELLO}
        async with http.post("/v1/chat/completions", json=body) as response:
            assert response.status == 504
        async with http.post("/v1/chat/completions", json={**body, "stream": True}) as response:
            assert response.status == 200
            events = (await response.text()).strip().split("\n\n")
        assert (
            orjson.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        )
        await peers.until(lambda: len(peers.cancels) >= 2)
        [tokenizing] = [
            child for child in psutil.Process().children() if "tokenizing" in str(child.cmdline())
        ]
        tokenizing.suspend()  # the deadline covers what comes before the stream, too
        async with http.post("/v1/chat/completions", json=body) as response:
            assert response.status == 504
    assert await gateway.stop() == 0


async def test_a_silent_stream_is_kept_alive(nats: NatsServer, cache: Any, peers: Peers) -> None:
    """While nothing comes from the TE the client gets comments."""

    async def slowly(request: Request) -> Accepted:
        peers.spawn(later(request))
        return peers.accepted(request)

    async def later(request: Request) -> None:
        await asyncio.sleep(0.7)
        await peers.generate(request)

    peers.on_request = slowly
    gateway = RunningGateway(nats.url, cache, keep_alive_s=0.2)
    await gateway.start()
    async with aiohttp.ClientSession(gateway.url) as http:
        text, comments = await chat(http)
    assert text == peers.text
    assert "keep-alive" in comments
    assert await gateway.stop() == 0


async def test_a_restarted_bus_costs_nothing_but_time(
    http: aiohttp.ClientSession, peers: Peers, nats: NatsServer
) -> None:
    """kill -9 of nats-server mid-stream, and a new one on its port: the text is whole and nothing is resubmitted."""
    peers.step_s = 0.05
    reading = asyncio.create_task(chat(http))
    await peers.until(lambda: peers.sequence >= 3)
    nats.kill()
    await asyncio.sleep(0.2)
    nats.start()
    assert (await reading)[0] == peers.text


@pytest.mark.parametrize("replayed", [False, True])
async def test_tokens_that_cannot_be_shown_end_their_request_only(
    http: aiohttp.ClientSession, peers: Peers, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last delta whose logprobs are too few fails its own call, also when it was replayed; the gateway lives on."""
    monkeypatch.setattr(delivery, "PROBE_S", (0.3, 8.0))
    whole = peers.deltas
    peers.deltas = lambda request: [  # type: ignore[method-assign]
        [dataclasses.replace(delta, logprobs=[]) for delta in step] for step in whole(request)
    ]
    peers.lose = lambda step, delta: replayed
    body = {"model": MODEL, "messages": HELLO, "logprobs": True, "max_tokens": 1}
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.status == 500
    peers.deltas = whole  # type: ignore[method-assign]
    peers.lose = lambda step, delta: False
    assert (await chat(http))[0] == peers.text


async def test_a_request_waits_for_the_bus(
    http: aiohttp.ClientSession,
    gateway: RunningGateway,
    peers: Peers,
    nats: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request that comes while the bus is away is sent once, when it is back."""
    monkeypatch.setattr(delivery, "SUBMIT_TIMEOUT_S", (0.2, 0.2))
    await chat(http)  # from now on the tenant's secret is known
    nats.kill()
    assert gateway.service is not None
    async with asyncio.timeout(5):
        while gateway.service.bus.connected:  # until then a request may go into the dead socket
            await asyncio.sleep(0.01)
    reading = asyncio.create_task(chat(http))
    await asyncio.sleep(0.8)
    # Who is back first is luck: let the gateway hear of it once there is somebody to send to.
    callbacks, is_back = gateway.service.bus._reconnect_callbacks, asyncio.Event()
    held = callbacks.copy()
    callbacks.clear()
    peers.bus.on_reconnect(is_back.set)
    nats.start()
    async with asyncio.timeout(5):
        await is_back.wait()
        while not gateway.service.bus.connected:
            await asyncio.sleep(0.01)
    for callback in held:
        callback()
    assert (await reading)[0] == peers.text
    assert [request.attempt for request in peers.requests] == [1, 1]


async def test_unwanted_tokens_are_cancelled(peers: Peers, gateway: RunningGateway) -> None:
    """A TE that works on a request nobody knows is told to stop, once a second at most."""
    assert gateway.service is not None
    for index in range(5):
        delta = Delta(request="unknown", attempt=3, choice=0, index=index, ids=[1])
        request = type("Named", (), {"client": gateway.service.id})
        await peers.send(request, [delta])  # type: ignore[arg-type]
    await peers.until(lambda: bool(peers.cancels))
    await asyncio.sleep(0.1)
    [cancel] = peers.cancels
    assert (cancel.request, cancel.attempt) == ("unknown", 3)
