"""What a client sees of a model that is asleep: comments while it is woken, or an answer at once that says when to come
back."""

from __future__ import annotations

import asyncio

import aiohttp
import orjson
import pytest

from services.gateway.actions import Emit, Submit
from services.gateway.answer import MAX_NOTICES, Answer
from services.gateway.choices import ChoiceText
from services.gateway.delivery import Delivery
from services.gateway.openai.chunks import waiting
from shared.errors import NotReady
from shared.messages import Accepted, Failure, Progress, Request
from shared.text.tokenizer import Tokenizer
from tests.gateway.peers import MODEL, Peers
from tests.gateway.world import LIMITS, delta

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
SLOW = NotReady("none in time", retry_after_s=42.4)


def wake(peers: Peers) -> None:
    """From now on every request parks, and its TE takes a while."""

    async def say(request: Request, state: str, stage: str, percent: int = 0) -> None:
        progress = Progress(
            source=peers.je,
            request=request.request,
            attempt=request.attempt,
            state=state,
            te=peers.te if state == "dispatched" else None,
            stage=stage,
            percent=percent,
        )
        await peers.bus.publish(peers.bus.subjects.tokens(request.client), progress)

    async def start(request: Request) -> None:
        await asyncio.sleep(0.1)  # so that the answer is there first
        for percent in (40, 40, 80):
            await say(request, "parked", "loading", percent)
        await say(request, "parked", "warm")
        await say(request, "dispatched", "warm")
        await peers.generate(request)

    async def park(request: Request) -> Accepted:
        peers.spawn(start(request))
        return peers.accepted(request, te=None)

    peers.on_request = park


async def test_a_stream_tells_how_far_its_model_is(
    http: aiohttp.ClientSession, peers: Peers
) -> None:
    """SSE comments before the first token, each once: queued, loading with its percentage, warm."""
    wake(peers)
    async with http.post("/v1/chat/completions", json={**BODY, "stream": True}) as response:
        lines = [line.decode().strip() async for line in response.content]
    comments = [line for line in lines if line.startswith(":")]
    assert comments == [": queued", ": loading 40 %", ": loading 80 %", ": warm"]
    assert lines.index(": warm") < next(i for i, line in enumerate(lines) if line[:5] == "data:")
    assert lines[-2:] == ["data: [DONE]", ""]


async def test_tokens_may_be_faster_than_the_word_that_there_is_a_te(
    http: aiohttp.ClientSession, peers: Peers
) -> None:
    """The first token itself tells that the model is awake."""

    async def generate(request: Request) -> None:
        await asyncio.sleep(0.1)
        await peers.generate(request)

    async def park(request: Request) -> Accepted:
        peers.spawn(generate(request))
        return peers.accepted(request, te=None)

    peers.on_request = park
    async with http.post("/v1/chat/completions", json={**BODY, "stream": True}) as response:
        lines = [line.decode().strip() async for line in response.content if line.strip()]
    assert [line for line in lines if line[0] == ":"] == lines[:2] == [": queued", ": warm"]


async def test_an_answer_that_is_not_streamed_just_comes(
    http: aiohttp.ClientSession, peers: Peers
) -> None:
    """Without a stream nobody is told anything, and the answer is whole."""
    wake(peers)
    async with http.post("/v1/chat/completions", json=BODY) as response:
        answer = await response.json()
    assert answer["choices"][0]["message"]["content"] == peers.text


@pytest.mark.parametrize("stream", [True, False])
async def test_what_cannot_be_served_in_time_is_503_at_once(
    http: aiohttp.ClientSession, peers: Peers, stream: bool
) -> None:
    """The JE's word is final: one attempt, an HTTP status even for a stream, and its Retry-After."""

    async def refuse(request: Request) -> Accepted:
        raise SLOW

    peers.on_request = refuse
    async with http.post("/v1/chat/completions", json={**BODY, "stream": stream}) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "42")
        error = orjson.loads(await response.read())["error"]
    assert (error["code"], error["type"]) == ("model_not_ready", "server_error")
    assert len(peers.requests) == 1


def test_only_a_request_that_never_ran_gives_up_at_that() -> None:
    """One that lost its TE in the middle of its answer goes on trying: there was a TE a moment ago."""
    new = Delivery(1, LIMITS, 0.0, lambda: 0.5)
    new.start(0.0)
    [end] = new.refused(1, SLOW, 0.1)
    assert isinstance(end, Emit)
    assert end.failure is SLOW
    parked = Delivery(1, LIMITS, 0.0, lambda: 0.5)
    parked.start(0.0)
    parked.accepted(1, "je", None, 0.0)
    why = Failure(code=SLOW.code, message=SLOW.message, retry_after_s=SLOW.retry_after_s)
    failed = parked.tokens("je", delta(0, [], finish="failed", failure=why), 1.0)
    assert [action.finish for action in failed if isinstance(action, Emit)] == ["failed"]
    running = Delivery(1, LIMITS, 0.0, lambda: 0.5)
    running.start(0.0)
    running.accepted(1, "je", "te", 0.0)
    running.tokens("te", delta(0, [5]), 0.1)
    running.te_lost("te", 0.2)
    [again] = running.refused(2, SLOW, 0.3)
    assert isinstance(again, Submit)


def test_a_slow_reader_hears_what_is_the_case_now(tokenizer: Tokenizer) -> None:
    """Few notices wait, none twice in a row, and the latest is always among them."""
    answer = Answer([ChoiceText(0, tokenizer, stop=[])], streaming=True, keep_alive_s=9, now=0.0)
    for percent in range(50):
        answer.notice(waiting("loading", percent), 0.0)
        answer.notice(waiting("loading", percent), 0.0)
    assert len(answer._notices) == MAX_NOTICES
    assert answer._notices[-1] == "loading 49 %"
    assert len(set(answer._notices)) == MAX_NOTICES
    assert [waiting(stage, 101) for stage in ("loading", "warm", "what?\n")] == [
        "loading 100 %",
        "warm",
        "queued",
    ]
