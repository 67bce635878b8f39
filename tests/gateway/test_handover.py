"""A stream that is prefilled on one TE and decoded on another, seen through a whole gateway."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest

from shared.messages import Accepted, Down, Progress, Request
from tests.gateway.peers import MODEL, Peers
from tests.gateway.test_loss import HELLO, chat

Serve = Callable[[Request], Awaitable[Accepted]]


@pytest.fixture
async def decoder(peers: Peers) -> AsyncIterator[Peers]:
    """The TE that decodes; `peers` prefills, and is the JE."""
    second = Peers(peers.bus, peers.tokenizer, model="other")
    second.te, second.je, second.step_s = "te-decode", "scheduler-2", 0.01
    await second.start()
    yield second
    await second.stop()


async def moved(peers: Peers, request: Request, te: str) -> None:
    """The JE says who goes on."""
    progress = Progress(
        source=peers.je, request=request.request, attempt=request.attempt, state="moved", te=te
    )
    await peers.bus.publish(peers.bus.subjects.tokens(request.client), progress)


async def first_token(peers: Peers, request: Request) -> None:
    """The prefill TE's one frame."""
    [delta] = peers.deltas(request)[0]
    await peers.send(request, [dataclasses.replace(delta, moves=True)])


def splitting(peers: Peers, decoder: Peers, *, told: bool = True, lost: bool = False) -> Serve:
    """A JE that splits each request. Not `told`: its news are lost; `lost`: the first token is."""

    async def serve(request: Request) -> Accepted:
        peers.spawn(run(request))
        return peers.accepted(request)

    async def run(request: Request) -> None:
        peers.made[request.request, request.attempt] = 1
        if not lost:
            await first_token(peers, request)
        decoder.requests.append(request)  # so that it can replay all of it
        if told:
            await moved(peers, request, decoder.te)
        await decoder.generate(request, start=1)

    return serve


async def test_two_tes_one_stream(
    http: aiohttp.ClientSession, peers: Peers, decoder: Peers
) -> None:
    """The text is whole, in one attempt, and nobody had to be asked."""
    peers.on_request = splitting(peers, decoder)
    assert (await chat(http))[0] == peers.text
    assert len(peers.requests) == 1
    assert not peers.replays
    assert not decoder.replays


@pytest.mark.parametrize(("told", "lost"), [(False, False), (True, True)])
async def test_a_lost_word_between_the_two(
    http: aiohttp.ClientSession, peers: Peers, decoder: Peers, told: bool, lost: bool
) -> None:
    """Without the JE's news the decode TE's first frame will do; without the first token the decode TE is asked."""
    peers.on_request = splitting(peers, decoder, told=told, lost=lost)
    assert (await chat(http))[0] == peers.text
    assert len(peers.requests) == 1
    assert bool(decoder.replays) is lost


async def test_nobody_goes_on(http: aiohttp.ClientSession, peers: Peers, decoder: Peers) -> None:
    """`Prefilled` was lost: after a moment the request is sent again with its token, and both who knew are told."""

    async def serve(request: Request) -> Accepted:
        if request.attempt > 1:
            return await decoder.accept(request)
        peers.spawn(first_token(peers, request))
        return peers.accepted(request)

    peers.on_request = serve
    assert (await chat(http))[0] == peers.text
    _, second = peers.requests
    assert second.output == [peers.ids()[:1]]
    await peers.until(lambda: len(peers.cancels) == 2)  # at the TE's name and at the JE's


async def test_the_prefill_te_may_die_once_it_is_done(
    http: aiohttp.ClientSession, peers: Peers, decoder: Peers
) -> None:
    """Its death between the two is none of the gateway's business; that of the decode TE is."""

    async def serve(request: Request) -> Accepted:
        if request.attempt > 1:
            return await peers.accept(request)
        peers.spawn(run(request))
        return peers.accepted(request)

    async def die(te: str) -> None:
        down = Down(kind="te", id=te, reason="killed")
        await peers.bus.publish(peers.bus.subjects.down("te", te), down)

    async def run(request: Request) -> None:
        await first_token(peers, request)
        await die(peers.te)
        await asyncio.sleep(0.2)
        assert len(peers.requests) == 1
        await moved(peers, request, decoder.te)
        await decoder.generate(request, start=1, end=4)
        await die(decoder.te)

    peers.on_request = serve
    assert (await chat(http))[0] == peers.text
    _, second = peers.requests
    assert (second.output, second.avoid) == ([peers.ids()[:4]], [decoder.te])


async def test_a_client_that_leaves_between_the_two(
    http: aiohttp.ClientSession, peers: Peers, decoder: Peers
) -> None:
    """The prefill TE and the JE are told at once, and a TE that the JE names afterwards as soon as it does."""
    waiting = asyncio.Event()

    async def serve(request: Request) -> Accepted:
        peers.spawn(run(request))
        return peers.accepted(request)

    async def run(request: Request) -> None:
        await first_token(peers, request)
        waiting.set()

    peers.on_request = serve
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    async with http.post("/v1/chat/completions", json=body) as response:
        await waiting.wait()
        async for line in response.content:
            if b"content" in line and b'"content":""' not in line:
                break
        response.close()
    [request] = peers.requests
    await peers.until(lambda: len(peers.cancels) == 2)
    await moved(peers, request, decoder.te)
    await peers.until(lambda: [c.request for c in decoder.cancels] == [request.request])
