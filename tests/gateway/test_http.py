"""The gateway over real HTTP, with the openai client: shapes, errors, cancellation, bounds, drain."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from random import Random
from typing import Any

import aiohttp
import openai
import orjson
import pytest

from services.gateway.calls import seed_of
from services.gateway.openai.orders import CHAT, COMPLETION, UNSERVED
from shared.bus import Bus
from shared.errors import Overloaded
from shared.messages import Accepted, Cancel, Request
from shared.text.tokenizer import Tokenizer
from tests.gateway.peers import CONTEXT, MODEL, Peers, publish_model
from tests.gateway.running import RunningGateway

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def client(gateway: RunningGateway) -> Any:
    """The openai client, unmodified."""
    async with openai.AsyncOpenAI(
        base_url=gateway.url + "/v1", api_key="none", max_retries=0
    ) as made:
        yield made


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The error object of an answer, whose shape is checked."""
    body = orjson.loads(await response.read())
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


# ----------------------------------------------------------------------------------------------- what clients parse


async def test_a_chat(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """A chat answer parses, with its text, reason and usage, and the TE got what was asked."""
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0.5, seed=7, extra_body={"top_k": 5}
    )
    assert answer.choices[0].message.content == peers.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(peers.ids())
    assert answer.usage.prompt_tokens == len(peers.requests[0].prompt)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == peers.cached
    [request] = peers.requests
    assert peers.tokenizer.decode(request.prompt, skip_special=False) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert request.sampling.max_tokens == CONTEXT - len(request.prompt)
    assert (request.sampling.seed, request.sampling.top_k) == (7, 5)
    assert len(request.hashes) == len(request.prompt) // 16


async def test_a_streamed_chat(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """A chunk per token for each of n choices, interleaved, each with its role first and its reason last."""
    peers.step_s = 0.01
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index in range(2):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == peers.text
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert len(mine) == 1 + len(peers.ids()) - 1 + 1


async def test_completions_of_several_prompts(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """Choice i of prompt p is number p * n + i; equal prompts get different seeds."""
    answer = await client.completions.create(model=MODEL, prompt=["a", "a"], n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    first, second = peers.requests
    assert first.prompt == second.prompt
    assert first.sampling.seed != second.sampling.seed
    streamed = await client.completions.create(
        model=MODEL, prompt=[[5, 6], [7]], max_tokens=2, stream=True
    )
    texts: dict[int, str] = {}
    async for chunk in streamed:
        texts[chunk.choices[0].index] = (
            texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
        )
    assert texts == {0: "Hel", 1: "Hel"}
    assert sorted(request.prompt for request in peers.requests[2:]) == [[5, 6], [7]]


async def test_logprobs(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    """Chat logprobs parse: one entry per shown token, alternatives beside it."""
    answer = await client.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=4
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)


async def test_a_stop_string_cancels_its_choice(client: openai.AsyncOpenAI, peers: Peers) -> None:
    """The text ends before the stop string, the TE is told how many tokens count, and only those are billed."""
    peers.step_s = 0.01
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO, stop=["o there"])
    assert answer.choices[0].message.content == "Hell"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    await peers.until(lambda: bool(peers.cancels))
    [cancel] = peers.cancels
    assert (cancel.choice, cancel.keep) == (0, answer.usage.completion_tokens)


async def test_models(client: openai.AsyncOpenAI) -> None:
    """The catalogue lists the model; its name may hold a slash."""
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("nobody/knows")
    assert caught.value.code == "model_not_found"


async def test_tokenize_and_back(http: aiohttp.ClientSession, tokenizer: Tokenizer) -> None:
    """vLLM's tokenize and detokenize, for text and for chats."""
    body = {"model": MODEL, "prompt": "Hello", "return_token_strs": True}
    async with http.post("/tokenize", json=body) as response:
        answer = await response.json()
    ids = tokenizer.encode("Hello")
    strings = [tokenizer.id_to_text(token) for token in ids]
    assert answer == {
        "count": len(ids),
        "max_model_len": CONTEXT,
        "tokens": ids,
        "token_strs": strings,
    }
    async with http.post("/tokenize", json={"messages": HELLO}) as response:
        assert (await response.json())["count"] > len(ids)
    async with http.post("/detokenize", json={"model": MODEL, "tokens": ids}) as response:
        assert await response.json() == {"prompt": "Hello"}
    for options, status in (({"self": 1, "a b": 2}, 200), ({"messages": []}, 400)):
        body = {"model": MODEL, "messages": HELLO, "chat_template_kwargs": options}
        async with http.post("/tokenize", json=body) as response:
            assert response.status == status
    async with http.post("/detokenize", json={"model": MODEL, "tokens": [99999]}) as response:
        assert response.status == 400


async def test_idempotency_key_fixes_the_seed(http: aiohttp.ClientSession, peers: Peers) -> None:
    """The same key gives the same seed, at any gateway; without one seeds differ."""
    for key in ("k1", "k1", "k2", ""):
        headers = {"Idempotency-Key": key} if key else {}
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        async with http.post("/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200
    seeds = [request.sampling.seed for request in peers.requests]
    assert seeds[0] == seeds[1] == seed_of(None, "local", "k1")
    assert len(set(seeds)) == 3


async def test_request_ids_come_back(http: aiohttp.ClientSession) -> None:
    """A usable X-Request-Id is kept, an unusable one replaced; errors carry one too."""
    async with http.get("/v1/models", headers={"X-Request-Id": "abc-1"}) as response:
        assert response.headers["X-Request-Id"] == "abc-1"
    async with http.get("/nowhere", headers={"X-Request-Id": "a b"}) as response:
        assert response.status == 404
        assert response.headers["X-Request-Id"] not in ("", "a b")


# ----------------------------------------------------------------------------------------------------------- errors


async def test_hostile_bodies(http: aiohttp.ClientSession) -> None:
    """Whatever a body holds, the answer is 4xx in OpenAI's shape."""
    for raw, status in [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"text"', 400),
        (b"null", 400),
        (b'{"model": "a", "model"', 400),
        (b'{"temperature": NaN}', 400),
        (b'{"temperature": 1e999}', 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b'{"model": "\\ud800"}', 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
        (b'{"model": "\\u0000\\n", "messages": [{"role": "user", "content": "a"}]}', 404),
        (b'{"model": "' + b"x" * 5000 + b'", "messages": [{"role": "user", "content": "a"}]}', 404),
        (b'{"model": "a.*.>", "messages": [{"role": "user", "content": "a"}]}', 404),
    ]:
        async with http.post(
            "/v1/chat/completions", data=raw, headers={"Content-Type": "application/json"}
        ) as response:
            assert response.status == status, raw[:80]
            await error_of(response)


async def test_two_hundred_malformed_requests(http: aiohttp.ClientSession) -> None:
    """Bodies bent at random, field by field and byte by byte, get an answer below 500, and the service still works."""
    random = Random(7)
    odd: list[Any] = [
        *(
            None,
            True,
            -1,
            0,
            2**31,
            2**63,
            10**30,
            1e308,
            -0.5,
            "",
            "x" * 300,
            "\u0000\u202e",
            "tiny",
        ),
        *([], {}, [None], [[]], [{}], {"a": {}}, {"type": "json_object"}, [1, "a"], [HELLO] * 3),
    ]
    good = {"model": MODEL, "messages": HELLO, "prompt": "a", "max_tokens": 1}
    for number in range(200):
        path, fields = random.choice(
            (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION))
        )
        body: dict[str, Any] = dict(good)
        for name in random.sample([*fields, *UNSERVED], k=random.randrange(1, 4)):
            body[name] = random.choice(odd)
        raw = json.dumps(body).encode()
        if number % 4 == 0:
            place = random.randrange(len(raw))
            raw = raw[:place] + random.randbytes(3) + raw[place + random.randrange(9) :]
        headers = {"Content-Type": "application/json"}
        async with http.post(path, data=raw, headers=headers) as response:
            assert response.status < 500, raw
            if response.status != 200:
                await error_of(response)
            await response.read()
    async with http.post("/v1/chat/completions", json=good) as response:
        assert response.status == 200


async def test_errors_have_their_status(
    http: aiohttp.ClientSession, gateway: RunningGateway
) -> None:
    """Each kind of trouble has its own status, and the field at fault is named."""
    url = "/v1/chat/completions"
    long = [{"role": "user", "content": "word " * 2000}]
    for body, status, param, code in (
        ({"model": "x", "messages": HELLO}, 404, "model", "model_not_found"),
        ({"model": MODEL}, 400, "messages", "invalid_request"),
        ({"model": MODEL, "messages": long}, 400, "messages", "context_length_exceeded"),
        ({"model": MODEL, "messages": HELLO, "tools": [{}]}, 400, "tools", "invalid_request"),
        (
            {"model": MODEL, "messages": HELLO, "logit_bias": {"9999": 1}},
            400, "logit_bias", "invalid_request",
        ),
    ):  # fmt: skip
        async with http.post(url, json=body) as response:
            assert response.status == status
            error = await error_of(response)
            assert (error["param"], error["code"]) == (param, code)
    async with http.post(url, data=io.BytesIO(b"x" * (gateway.settings.max_body_bytes + 1)),
                         headers={"Content-Type": "application/json"}) as response:  # fmt: skip
        assert response.status == 413
    async with http.post(url, data=b"{}", headers={"Content-Type": "text/plain"}) as response:
        assert response.status == 415
        await error_of(response)
    async with http.get(url) as response:
        assert response.status == 405
        await error_of(response)


async def test_overload_is_429(http: aiohttp.ClientSession, peers: Peers) -> None:
    """A full platform is told to the client at once, with the time to wait, streaming or not."""

    async def full(request: Request) -> Accepted:
        raise Overloaded("every replica is full", retry_after_s=7)

    peers.on_request = full
    for stream in (False, True):
        body = {"model": MODEL, "messages": HELLO, "stream": stream}
        async with http.post("/v1/chat/completions", json=body) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "7"
            assert (await error_of(response))["type"] == "rate_limit_error"


async def test_a_damaged_copy_of_the_model_is_refused(
    http: aiohttp.ClientSession, bus: Bus, gateway: RunningGateway
) -> None:
    """A model whose tokenizer differs from the engine's is not served, and the answer says why."""
    entry = dataclasses.replace(
        publish_model(gateway.settings.cache_dir), name="other", tokenizer_digest="0" * 64
    )
    publish_model(gateway.settings.cache_dir, "other")
    await (await bus.table("models")).put("other", entry)
    await asyncio.sleep(0.6)
    async with http.post("/v1/completions", json={"model": "other", "prompt": "a"}) as response:
        assert response.status == 503
        assert "tokenizer" in (await error_of(response))["message"]


# ------------------------------------------------------------------------------------------------ leaving and bounds


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_cancelled(
    http: aiohttp.ClientSession, peers: Peers, stream: bool
) -> None:
    """A closed connection cancels the request at its TE, streaming or not."""
    peers.step_s = 0.02
    peers.text = "word " * 80

    async def read() -> None:
        body = {"model": MODEL, "messages": HELLO, "stream": stream}
        async with http.post("/v1/chat/completions", json=body) as response:
            await response.read()

    reader = asyncio.create_task(read())
    await peers.until(lambda: peers.sequence > 3)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await peers.until(lambda: bool(peers.cancels), 5)
    [request] = peers.requests
    assert peers.cancels[0] == Cancel(request=request.request, attempt=1)


async def test_a_reader_that_stops_reading_loses_nothing(
    gateway: RunningGateway, peers: Peers
) -> None:
    """A client that reads late gets the whole text, though the model was far ahead."""
    peers.text = "word " * 90
    body = orjson.dumps({"model": MODEL, "messages": HELLO, "stream": True})
    host, port = gateway.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.0\r\nHost: %s\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (host.encode(), len(body), body)
    )
    await peers.until(lambda: peers.sequence >= len(peers.ids()))
    await asyncio.sleep(0.3)
    answer = b""
    while more := await reader.read(65536):
        answer += more
    writer.close()
    events = [line[6:] for line in answer.splitlines() if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    deltas = [orjson.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == peers.text


async def test_calls_in_flight_are_bounded(nats: Any, cache: Any, peers: Peers) -> None:
    """One call more than allowed is refused with Retry-After, and counts free when its client leaves."""
    gateway = RunningGateway(nats.url, cache, max_in_flight=1)
    await gateway.start()
    peers.step_s = 0.2
    async with aiohttp.ClientSession(gateway.url) as http:
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        async with http.post("/v1/chat/completions", json=body) as first:
            assert first.status == 200
            async with http.post("/v1/chat/completions", json=body) as second:
                assert second.status == 429
                assert "Retry-After" in second.headers
    peers.step_s = 0
    await asyncio.sleep(0.1)
    assert await gateway.stop() == 0


async def test_bodies_in_flight_have_a_byte_budget(nats: Any, cache: Any, peers: Peers) -> None:
    """Past the budget a body is refused with 429 before it is read, and its room is free again after the answer."""
    gateway = RunningGateway(nats.url, cache, body_budget_bytes=2000)
    await gateway.start()
    peers.step_s = 0.2
    async with aiohttp.ClientSession(gateway.url) as http:
        body = {"model": MODEL, "messages": HELLO, "stream": True, "user": "x" * 1200}
        async with http.post("/v1/chat/completions", json=body) as first:
            assert first.status == 200
            async with http.post("/v1/chat/completions", json=body) as second:
                assert second.status == 429
                assert second.headers["Retry-After"] == "1"
            peers.step_s = 0
            await first.read()
        async with http.post("/v1/chat/completions", json=body) as third:
            assert third.status == 200
            await third.read()
    assert await gateway.stop() == 0


async def test_draining_finishes_open_streams(nats: Any, cache: Any, peers: Peers) -> None:
    """While stopping, new calls get 503 with Retry-After, and open ones run to their end."""
    gateway = RunningGateway(nats.url, cache)
    await gateway.start()
    peers.step_s = 0.05
    async with aiohttp.ClientSession(gateway.url) as http:
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        async with http.post("/v1/chat/completions", json=body) as stream:
            await stream.content.readline()
            stopping = asyncio.create_task(gateway.stop())
            await asyncio.sleep(0.05)
            async with http.post("/v1/chat/completions", json=body) as late:
                assert late.status == 503
                assert late.headers["Retry-After"]
            async with http.get("/ready") as ready:
                assert ready.status == 503
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        assert await stopping == 0


# -------------------------------------------------------------------------------------------------- keys and views


async def test_keys_guard_everything_but_probes(nats: Any, cache: Any, peers: Peers) -> None:
    """With keys a caller without one sees only the probes; only the operator may look inside."""
    gateway = RunningGateway(nats.url, cache, api_keys="acme:k1,operator:k2")
    await gateway.start()
    async with aiohttp.ClientSession(gateway.url) as http:
        for path in ("/health", "/ready"):
            async with http.get(path) as response:
                assert response.status == 200
        for path in ("/v1/models", "/metrics", "/debug/status", "/nowhere"):
            for headers in ({}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic k1"}):
                async with http.get(path, headers=headers) as response:
                    assert response.status == 401
                    assert (await error_of(response))["code"] == "invalid_api_key"
        found = {"/debug/status": 200, "/debug/kv/ledger": 200, "/debug/requests/x/placement": 404}
        for path, status in found.items():
            for key, expected in (("k1", 403), ("k2", status)):
                async with http.get(path, headers={"Authorization": f"Bearer {key}"}) as response:
                    assert response.status == expected
        body = {"model": MODEL, "prompt": "a" * 40, "max_tokens": 1}
        for key in ("k1", "k2", "k1"):
            headers = {"Authorization": f"Bearer {key}"}
            async with http.post("/v1/completions", json=body, headers=headers) as response:
                assert response.status == 200
    acme, operator, again = peers.requests
    assert (acme.tenant, operator.tenant) == ("acme", "operator")
    assert acme.hashes == again.hashes
    assert acme.hashes != operator.hashes  # nothing of the KV cache crosses tenants
    assert await gateway.stop() == 0


async def test_a_keyless_port_is_guarded_against_web_pages(http: aiohttp.ClientSession) -> None:
    """A rebound Host name and a foreign Origin are refused; this machine's own names are not."""
    for headers, status in (
        ({"Host": "evil.example:8000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:8000"}, 200),
        ({"Origin": "http://127.0.0.1:3000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
    ):
        async with http.get("/v1/models", headers=headers) as response:
            assert response.status == status


async def test_metrics_and_status(
    http: aiohttp.ClientSession, client: openai.AsyncOpenAI, gateway: RunningGateway
) -> None:
    """What dashboards read is counted, and the status names every service."""
    await client.chat.completions.create(model=MODEL, messages=HELLO)
    async with http.get("/metrics") as response:
        text = await response.text()
    for line in (
        f'vllm:time_to_first_token_seconds_count{{model_name="{MODEL}"}} 1.0',
        f'vllm:request_success_total{{finished_reason="stop",model_name="{MODEL}"}} 1.0',
        f'vllm:request_generation_tokens_count{{model_name="{MODEL}"}} 1.0',
        "deepflow_gateway_requests_in_flight 0.0",
    ):
        assert line in text
    async with http.get("/debug/status") as response:
        [service] = (await response.json())["services"]
    assert service["kind"] == "gateway"
    assert service["models"] == [MODEL]
    assert service["url"] == gateway.url
