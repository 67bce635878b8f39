"""Explicit context caches over real HTTP: made, continued from, counted, bounded, and ended for good."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import orjson
import pytest

from services.gateway import contexts
from shared.blockhash import chain
from shared.bus import Bus
from shared.errors import Unavailable
from shared.messages import Accepted, ContextCache, Request
from tests.gateway.peers import CONTEXT, MODEL, Peers
from tests.gateway.running import RunningGateway
from tests.gateway.tenants import MADE, QUESTION, SYSTEM, Caller
from tests.gateway.test_producers import ask
from tests.nats_server import NatsServer

PAGE = 16
Start = Callable[..., Awaitable[RunningGateway]]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways look at the table more often than they would."""
    monkeypatch.setattr(contexts, "REFRESH_S", 0.3)


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    return [nested(depth - 1)] if depth else []


async def no_entries(bus: Bus) -> bool:
    """Whether the table holds nothing, neither entries nor contents."""
    table = await bus.table("caches")
    return not await table.all(ContextCache) and not await table.part("contents").all(ContextCache)


# --------------------------------------------------------------------------------------------- making and continuing


async def test_a_context_is_computed_and_kept(
    callers: tuple[Caller, Caller, Caller], peers: Peers
) -> None:
    """Making a cache sends its prompt, without a generation prompt, to be computed and kept, and tells what it is."""
    alice, *_ = callers
    before = int(time.time())
    made = await alice.make(name="rules")
    [request] = peers.requests
    text = peers.tokenizer.decode(request.prompt, skip_special=False)
    assert text == f"<|im_start|>system\n{SYSTEM[0]['content']}<|im_end|>\n"
    assert (request.kind, request.sampling.max_tokens, request.tenant) == ("cache", 1, "alice")
    assert request.keep is not None
    assert (request.keep.id, request.keep.ttl_ms) == (made["id"], 600_000)
    assert request.hashes == chain(request.root, request.prompt, PAGE)
    assert before <= made["created_at"] <= int(time.time())
    assert made == {
        "id": made["id"],
        "object": "cache",
        "model": MODEL,
        "name": "rules",
        "tokens": len(request.prompt),
        "public": False,
        "created_at": made["created_at"],
        "expires_at": made["created_at"] + 600,
        "usage": {"requests": 0, "cached_tokens": 0},
    }
    assert await alice.call("GET", f"/v1/caches/{made['id']}") == (200, made)


async def test_a_chat_continues_from_a_context(
    callers: tuple[Caller, Caller, Caller], peers: Peers
) -> None:
    """A chat that names a cache is the chat with the cache's messages before its own, page for page; its hits are
    counted, here and at the cache."""
    alice, *_ = callers
    made = await alice.make(chat_template_kwargs={"mood": "good"})
    peers.cached = 48
    status, answer = await alice.chat(cache=made["id"])
    assert status == 200
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 48
    assert (await alice.chat([*SYSTEM, *QUESTION]))[0] == 200
    kept, continued, whole = peers.requests
    assert (continued.prompt, continued.hashes) == (whole.prompt, whole.hashes)
    assert continued.hashes[: len(kept.hashes)] == kept.hashes
    assert (continued.kind, continued.keep) == ("chat", None)
    _, seen = await alice.call("GET", f"/v1/caches/{made['id']}")
    assert seen["usage"] == {"requests": 1, "cached_tokens": 48}


async def test_a_completion_continues_from_a_text(
    callers: tuple[Caller, Caller, Caller], peers: Peers
) -> None:
    """Each prompt that names a cache of text is the one with that text before it, whatever the last token merges
    with; the kept pages are those of any continuation."""
    alice, *_ = callers
    text = "the quick brown fox jumps over the lazy dog " * 3
    made = await alice.make(messages=None, text=text)
    body = {"model": MODEL, "prompt": ["and", " then"], "max_tokens": 2, "cache": made["id"]}
    status, answer = await alice.call("POST", "/v1/completions", body)
    assert status == 200
    assert len(answer["choices"]) == 2
    kept, *continued = peers.requests
    for request in continued:
        assert request.hashes[: len(kept.hashes)] == kept.hashes
        assert request.prompt[: len(kept.prompt)] == kept.prompt
    texts = {peers.tokenizer.decode(request.prompt) for request in continued}
    assert texts == {text + "and", text + " then"}


async def test_a_context_of_another_kind_is_refused(
    callers: tuple[Caller, Caller, Caller], peers: Peers
) -> None:
    """Text cannot begin a chat, messages cannot begin a text, token ids cannot continue one, and the field says so."""
    alice, *_ = callers
    chat = await alice.make()
    text = await alice.make(messages=None, text="word " * 40)
    for path, body, param in (
        ("chat/completions", {"messages": QUESTION, "cache": text["id"]}, "cache"),
        ("completions", {"prompt": "a", "cache": chat["id"]}, "cache"),
        ("completions", {"prompt": [5, 6], "cache": text["id"]}, "prompt"),
    ):
        status, answer = await alice.call("POST", f"/v1/{path}", {"model": MODEL, **body})
        assert (status, answer["error"]["param"]) == (400, param)
    assert len(peers.requests) == 2


async def test_a_context_that_cannot_be_computed_is_none(
    callers: tuple[Caller, Caller, Caller], peers: Peers, bus: Bus
) -> None:
    """A failure while computing is the caller's answer, leaves no entry, and frees whatever was kept."""
    alice, *_ = callers

    async def refuse(request: Request) -> Accepted:
        raise Unavailable("no")

    peers.on_request = refuse
    task = asyncio.create_task(alice.call("POST", "/v1/caches", MADE))
    await peers.until(lambda: bool(peers.requests))
    task.cancel()  # the client leaves
    keep = peers.requests[0].keep
    assert keep is not None
    await peers.until(lambda: keep.id in peers.freed)
    assert await no_entries(bus)
    # Once more: the TE may have heard of that before it heard of the cancel, and kept the pages in between.
    await peers.until(lambda: peers.freed == [keep.id] * 2)


# ------------------------------------------------------------------------------------------------------ who sees what


async def test_foreign_expired_and_unknown_are_alike(
    callers: tuple[Caller, Caller, Caller],
    peers: Peers,
    bus: Bus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever may not use a cache cannot tell whether it is another's, has ended, or never was: 404, with one body."""
    alice, bob, _ = callers
    ended, deleted, foreign = [await alice.make(ttl=ttl) for ttl in (1, 600, 600)]
    ids = {"unknown": "cache_" + "0" * 32, "deleted": deleted["id"], "foreign": foreign["id"]}
    ids["expired"] = ended["id"]
    ids["impossible"] = "\N{SNOWMAN}" * 200
    assert await alice.call("DELETE", f"/v1/caches/{deleted['id']}") == (
        200,
        {"id": deleted["id"], "object": "cache.deleted", "deleted": True},
    )
    await asyncio.sleep(1.1)
    for how, id_ in ids.items():
        who = bob if how == "foreign" else alice
        for method, path, body in (
            ("GET", f"/v1/caches/{id_}", None),
            ("PATCH", f"/v1/caches/{id_}", {"ttl": 60}),
            ("DELETE", f"/v1/caches/{id_}", None),
            ("POST", "/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "cache": id_}),
        ):
            error = {
                "message": f"The cache {id_[:100]!r} does not exist",
                "type": "invalid_request_error",
                "param": "cache" if method == "POST" else None,
                "code": "cache_not_found",
            }
            assert await who.call(method, path, body) == (404, {"error": error}), (how, method)
    assert await alice.call("GET", f"/v1/caches/{foreign['id']}") == (200, foreign)
    assert len(peers.requests) == 3  # nothing was computed for any of them


async def test_an_expired_context_is_swept(
    callers: tuple[Caller, Caller, Caller], peers: Peers, bus: Bus
) -> None:
    """A cache past its time leaves the table, contents and all, and those who keep its pages are told."""
    alice, *_ = callers
    made = await alice.make(ttl=1)
    await peers.until(lambda: made["id"] in peers.freed)
    assert await no_entries(bus)
    assert (await alice.call("GET", "/v1/caches"))[1]["data"] == []


async def test_a_deleted_context_is_freed(
    callers: tuple[Caller, Caller, Caller], peers: Peers, bus: Bus
) -> None:
    """Deleting a cache removes entry and contents, and tells those who keep its pages."""
    alice, *_ = callers
    made = await alice.make()
    assert (await alice.call("DELETE", f"/v1/caches/{made['id']}"))[0] == 200
    await peers.until(lambda: peers.freed == [made["id"]])
    assert await no_entries(bus)


async def test_the_list_is_ones_own(callers: tuple[Caller, Caller, Caller]) -> None:
    """A list shows one's own caches only, part by part in either order, each once; and by name."""
    alice, bob, _ = callers
    made = [(await alice.make(name=f"n{i}"))["id"] for i in range(5)]
    other = await bob.make(name="n0")
    for order in ("asc", "desc"):
        seen: list[str] = []
        page: dict[str, Any] = {"has_more": True}
        while page["has_more"]:
            after = f"&after={seen[-1]}" if seen else ""
            path = f"/v1/caches?limit=2&order={order}{after}"
            status, page = await alice.call("GET", path)
            assert status == 200
            seen += [one["id"] for one in page["data"]]
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], seen[-1])
        assert sorted(seen) == sorted(made)
    _, named = await alice.call("GET", "/v1/caches?name=n3")
    assert [one["id"] for one in named["data"]] == [made[3]]
    for query, param in (
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("after=" + other["id"], "after"),
    ):
        status, answer = await alice.call("GET", f"/v1/caches?{query}")
        assert (status, answer["error"]["param"]) == (400, param)


# ------------------------------------------------------------------------------------------------------------- bounds


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"text": "both " * 40}, "text"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"ttl": 0}, "ttl"),
    ({"ttl": 10**9}, "ttl"),
    ({"name": ""}, "name"),
    ({"public": 1}, "public"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),  # less than a page
    ({"messages": None, "text": "a"}, "text"),
    ({"messages": None, "text": "a " * CONTEXT}, "text"),  # more than the context
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"deep": nested(300)}}, "chat_template_kwargs"),
]


async def test_bodies_that_cannot_be(callers: tuple[Caller, Caller, Caller], peers: Peers) -> None:
    """What can never be a cache is refused by the field at fault, before anything is computed."""
    for body, param in IMPOSSIBLE:
        status, answer = await callers[0].call("POST", "/v1/caches", MADE | body)
        assert (status, answer["error"]["param"]) == (400, param), body
    assert not peers.requests


async def test_what_the_table_cannot_hold(
    callers: tuple[Caller, Caller, Caller], peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contents too long for one entry are refused by the field's name."""
    monkeypatch.setattr(contexts, "MAX_BYTES", 200)
    status, answer = await callers[0].call("POST", "/v1/caches", MADE)
    assert (status, answer["error"]["param"]) == (413, "messages")
    assert not peers.requests


async def test_a_tenant_has_a_quota(
    start: Start, session: aiohttp.ClientSession, peers: Peers
) -> None:
    """Number and tokens of a tenant's caches are bounded across gateways and calls in flight; what ends makes room."""
    one, two = await start(num_contexts=2), await start(num_contexts=2, context_tokens=100)
    alice, elsewhere = Caller(session, one, "alice"), Caller(session, two, "alice")
    first = await alice.make()
    assert 50 < first["tokens"] < 100
    status, answer = await elsewhere.call("POST", "/v1/caches", MADE)  # too many tokens
    assert (status, answer["error"]["code"]) == (429, "insufficient_quota")
    answers = await asyncio.gather(*(alice.call("POST", "/v1/caches", MADE) for _ in range(4)))
    assert sorted(status for status, _ in answers) == [200, 429, 429, 429]
    assert (await Caller(session, one, "bob").call("POST", "/v1/caches", MADE))[0] == 200
    assert (await elsewhere.call("DELETE", f"/v1/caches/{first['id']}"))[0] == 200
    assert (await alice.call("POST", "/v1/caches", MADE))[0] == 200


async def test_names_are_unique(
    start: Start, session: aiohttp.ClientSession, peers: Peers, bus: Bus
) -> None:
    """A tenant has one cache of a name, also when two gateways make it at once; another tenant may use the name."""
    alice, elsewhere = [Caller(session, await start(), "alice") for _ in range(2)]
    body = MADE | {"name": "rules"}
    peers.step_s = 0.2
    both = await asyncio.gather(
        *(who.call("POST", "/v1/caches", body) for who in (alice, elsewhere))
    )
    assert sorted(status for status, _ in both) == [200, 409]
    [refused] = [answer for status, answer in both if status == 409]
    assert (refused["error"]["param"], refused["error"]["code"]) == ("name", "conflict")
    _, listed = await alice.call("GET", "/v1/caches")
    assert [one["name"] for one in listed["data"]] == ["rules"]
    loser = {request.keep.id for request in peers.requests if request.keep} - {
        listed["data"][0]["id"]
    }
    await peers.until(lambda: set(peers.freed) == loser)


async def test_a_key_makes_one_context(
    callers: tuple[Caller, Caller, Caller], peers: Peers
) -> None:
    """A repeated Idempotency-Key gives the cache it made, computes nothing, and is refused for anything else; another
    tenant's equal key is another."""
    alice, bob, _ = callers
    key = {"Idempotency_Key": "k1"}
    _, made = await alice.call("POST", "/v1/caches", MADE, **key)
    assert await alice.call("POST", "/v1/caches", MADE, **key) == (200, made)
    assert len(peers.requests) == 1
    status, _ = await alice.call("POST", "/v1/caches", MADE | {"name": "other"}, **key)
    assert status == 409
    _, other = await bob.call("POST", "/v1/caches", MADE, **key)
    assert other["id"] != made["id"]


async def test_a_context_can_be_renewed(
    callers: tuple[Caller, Caller, Caller], peers: Peers
) -> None:
    """A renewal asks once more to keep the same prompt, for the time given, and moves the end."""
    alice, *_ = callers
    made = await alice.make(ttl=60)
    status, renewed = await alice.call("PATCH", f"/v1/caches/{made['id']}", {"ttl": 6000})
    assert status == 200
    assert renewed["expires_at"] > made["expires_at"] + 5000
    first, second = peers.requests
    assert (first.prompt, first.hashes) == (second.prompt, second.hashes)
    assert second.keep is not None
    assert (second.keep.id, second.keep.ttl_ms) == (made["id"], 6_000_000)
    assert await alice.call("GET", f"/v1/caches/{made['id']}") == (200, renewed)


async def test_a_context_deleted_while_it_is_renewed(
    callers: tuple[Caller, Caller, Caller], peers: Peers
) -> None:
    """What is computed for a cache that is gone meanwhile is freed once it is there, and the caller is told so."""
    alice, *_ = callers
    made = await alice.make()
    deleted = asyncio.Event()

    async def accept_late(request: Request) -> Accepted:
        await deleted.wait()
        return await peers.accept(request)

    peers.on_request = accept_late
    renewal = asyncio.create_task(alice.call("PATCH", f"/v1/caches/{made['id']}", {"ttl": 6000}))
    await peers.until(lambda: len(peers.requests) == 2)
    assert (await alice.call("DELETE", f"/v1/caches/{made['id']}"))[0] == 200
    await peers.until(lambda: len(peers.freed) == 1)
    deleted.set()
    status, answer = await renewal
    assert (status, answer["error"]["code"]) == (404, "cache_not_found")
    await peers.until(lambda: len(peers.freed) > 1)
    assert set(peers.freed) == {made["id"]}


async def test_use_is_added_up(
    start: Start, session: aiohttp.ClientSession, peers: Peers, bus: Bus
) -> None:
    """What several gateways counted is in the table after a while, also of one that was stopped at once."""
    one, two = await start(), await start()
    alice, elsewhere = Caller(session, one, "alice"), Caller(session, two, "alice")
    made = await alice.make()
    for who in (alice, elsewhere, elsewhere):
        assert (await who.chat(cache=made["id"]))[0] == 200
    assert await two.stop() == 0
    table = await bus.table("caches")

    async def entry() -> ContextCache:
        found = await table.get(made["id"], ContextCache)
        assert found is not None
        return found

    end = time.monotonic() + 10
    while (await entry()).requests < 3 and time.monotonic() < end:
        await asyncio.sleep(0.1)
    kept = await entry()
    assert (kept.requests, kept.cached_tokens) == (3, 3 * peers.cached)
    assert (kept.messages, kept.text) == ("", "")  # the index stays short


async def test_contexts_in_hand_are_bounded(
    start: Start, session: aiohttp.ClientSession, peers: Peers
) -> None:
    """What requests continue from counts against the memory of requests in flight, like their own bodies."""
    alice = Caller(session, await start(body_budget_bytes=1024), "alice")
    made = await alice.make(messages=None, text="word " * 80)
    peers.step_s = 0.2

    async def complete(prompt: Any) -> int:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "cache": made["id"]}
        status, _ = await alice.call("POST", "/v1/completions", body)
        assert isinstance(status, int)
        return status

    assert sorted(await asyncio.gather(complete("a"), complete("b"), complete("c"))) == [
        200,
        200,
        429,
    ]
    assert await complete(["a", "b", "c", "d"]) == 200  # alone


async def test_a_context_before_many_prompts(
    start: Start, session: aiohttp.ClientSession, peers: Peers
) -> None:
    """A few bytes that name a cache cannot stand for more than a whole body could hold."""
    alice = Caller(session, await start(max_body_bytes=2048), "alice")
    made = await alice.make(messages=None, text="word " * 80)
    for num_prompts, status in ((5, 200), (6, 413)):
        body = {"model": MODEL, "prompt": ["a"] * num_prompts, "max_tokens": 1, "cache": made["id"]}
        assert (await alice.call("POST", "/v1/completions", body))[0] == status


async def test_a_producer_continues_from_a_context(
    http: aiohttp.ClientSession, peers: Peers, nats: NatsServer
) -> None:
    """A prompt from the bus may name a cache of its tenant, too."""
    async with http.post("/v1/caches", json=MADE) as response:
        made = await response.json()
    body = {"messages": QUESTION, "max_tokens": 2, "cache": made["id"]}
    [raw] = await ask(nats.url, orjson.dumps(body))
    answer = orjson.loads(raw)
    assert answer["usage"]["completion_tokens"] == 2
    kept, continued = peers.requests
    assert continued.hashes[: len(kept.hashes)] == kept.hashes


# ---------------------------------------------------------------------------------------------------- public prefixes


async def test_a_public_prefix_is_shared(
    start: Start, session: aiohttp.ClientSession, peers: Peers
) -> None:
    """The operator's public prefix gives every tenant's prompt that begins with it the same first hashes, at every
    gateway; from its last page on, and for all other prompts, tenants have nothing in common."""
    one, two = await start(), await start()
    operator = Caller(session, one, "operator")
    alice, bob = Caller(session, one, "alice"), Caller(session, two, "bob")
    assert (await alice.call("POST", "/v1/caches", MADE | {"public": True}))[0] == 403
    made = await operator.make(public=True)
    [kept] = peers.requests
    num_shared = len(kept.hashes) - 1
    await asyncio.sleep(2 * contexts.REFRESH_S)  # the other gateway hears of it
    long: list[Any] = [{"role": "user", "content": "Tell me all there is to know. " * 3}]
    other: list[Any] = [{"role": "system", "content": SYSTEM[0]["content"].upper()}]
    for messages in ([*SYSTEM, *QUESTION], [*SYSTEM, *long], [*other, *long]):
        assert (await alice.chat(messages))[0] == (await bob.chat(messages))[0] == 200
    short_a, short_b, long_a, long_b, other_a, other_b = peers.requests[1:]
    for mine, yours in ((short_a, short_b), (long_a, long_b)):
        assert mine.prompt == yours.prompt
        assert len(mine.hashes) == len(mine.prompt) // PAGE
        assert mine.hashes[:num_shared] == yours.hashes[:num_shared] == kept.hashes[:num_shared]
        assert not set(mine.hashes[num_shared:]) & {*yours.hashes, *kept.hashes}
    assert not set(other_a.hashes) & {*other_b.hashes, *kept.hashes}
    # Its id is the operator's alone.
    assert (await alice.chat(cache=made["id"]))[0] == 404
    assert (await operator.call("DELETE", f"/v1/caches/{made['id']}"))[0] == 200
    await asyncio.sleep(2 * contexts.REFRESH_S)
    assert (await alice.chat([*SYSTEM, *QUESTION]))[0] == 200
    assert not set(peers.requests[-1].hashes) & set(kept.hashes)


async def test_no_client_names_a_salt(callers: tuple[Caller, Caller, Caller], bus: Bus) -> None:
    """No field of a body chooses whose hashes a prompt gets."""
    alice, *_ = callers
    status, answer = await alice.chat(cache_salt="bob")
    assert (status, answer["error"]["param"]) == (400, "cache_salt")
