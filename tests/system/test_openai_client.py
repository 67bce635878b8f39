"""The unmodified `openai` client against the whole stack and the real model."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import openai
import pytest

from tests.system.conftest import MODEL
from tests.system.stack import Stack, body, stream, stream_all

pytestmark = [pytest.mark.system, pytest.mark.smollm2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
async def client(stack: Stack) -> openai.AsyncOpenAI:
    """A client without retries, so that each failure shows."""
    return openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


async def test_a_chat_answers_paris(client: openai.AsyncOpenAI) -> None:
    """The capital of France is Paris, and usage adds up."""
    async with client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=32
        )

    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_streamed_chat_says_the_same(client: openai.AsyncOpenAI) -> None:
    """The deltas of a stream add up to the message of the same request without streaming."""
    async with client:
        whole = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=24
        )
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=MODEL,
                messages=QUESTION,
                temperature=0,
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
            )
        ]

    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage or (
        chunks[-1].usage is not None
        and whole.usage is not None
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )


async def test_completions_with_logprobs(client: openai.AsyncOpenAI) -> None:
    """A completion's log-probabilities are as many as its tokens and not positive, and the sampled one is greedy."""
    async with client:
        answer = await client.completions.create(
            model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=6, logprobs=3
        )
    logprobs = answer.choices[0].logprobs

    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert len(logprobs.tokens) == 6
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert value <= 0
        assert max(top, key=lambda name: top[name]) == token


async def test_chat_logprobs(client: openai.AsyncOpenAI) -> None:
    """Chat log-probabilities carry token, bytes and alternatives."""
    async with client:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            max_tokens=5,
            logprobs=True,
            top_logprobs=2,
        )
    content = answer.choices[0].logprobs and answer.choices[0].logprobs.content

    assert content
    assert len(content) == 5
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(bytes(entry.bytes or b"").decode() == entry.token for entry in content)


async def test_two_choices_are_two_samples(client: openai.AsyncOpenAI) -> None:
    """n=2 gives two choices, reproducible by seed, and choice 0 is that of n=1."""
    async with client:
        arguments = {
            "model": MODEL,
            "messages": QUESTION,
            "temperature": 1.5,
            "seed": 7,
            "max_tokens": 12,
        }
        two = await client.chat.completions.create(**arguments, n=2)
        again = await client.chat.completions.create(**arguments, n=2)
        one = await client.chat.completions.create(**arguments)
    texts = [choice.message.content for choice in two.choices]

    assert [choice.index for choice in two.choices] == [0, 1]
    assert texts[0] != texts[1]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] == one.choices[0].message.content


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    """The model is in the list and can be asked for; an unknown one is the client's NotFoundError."""
    async with client:
        assert MODEL in [model.id async for model in client.models.list()]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nothing")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="nothing", messages=QUESTION)
    assert caught.value.code == "model_not_found"


async def test_too_long_a_prompt_names_both_numbers(client: openai.AsyncOpenAI) -> None:
    """A prompt past the context is a 400 that tells its length and the limit."""
    async with client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model=MODEL, prompt=[5] * 100_000)
    assert "100000" in str(caught.value).replace(",", "")
    assert caught.value.status_code == 400


async def test_a_stop_string_ends_the_text_before_it(client: openai.AsyncOpenAI) -> None:
    """A stop string, wherever it straddles tokens, is not in the text, and finish_reason is stop."""
    async with client:
        plain = await client.completions.create(
            model=MODEL, prompt="The quick brown fox", temperature=0, max_tokens=24
        )
        text = plain.choices[0].text
        stop = text[len(text) // 2 - 2 : len(text) // 2 + 3]
        stopped = await client.completions.create(
            model=MODEL, prompt="The quick brown fox", temperature=0, max_tokens=24, stop=[stop]
        )

    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


async def test_a_repeated_prompt_is_cached(stack: Stack) -> None:
    """Of three equal long prompts on two TEs one finds its pages in the cache, says so, and has the same text."""
    request = body(MODEL, "word " * 200 + "cached?", 4)
    streams = [(await stream_all(stack.url, [request]))[0] for _ in range(3)]

    cached = [s.usage["prompt_tokens_details"]["cached_tokens"] for s in streams]
    assert cached[0] == 0
    assert max(cached) >= 128
    assert max(cached) % 16 == 0
    assert len({s.text for s in streams}) == 1


async def test_the_raw_events_come_in_the_documented_order(stack: Stack) -> None:
    """role, one chunk per token, finish, usage, [DONE]; every event is `data: ` + JSON + blank line."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{stack.url}/v1/chat/completions",
            json={
                "model": MODEL,
                "messages": QUESTION,
                "temperature": 0,
                "max_tokens": 4,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ) as response,
    ):
        assert response.headers["Content-Type"].startswith("text/event-stream")
        raw = (await response.read()).decode()
    events = raw.split("\n\n")
    assert events.pop() == ""
    data = [event for event in events if not event.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in data)
    assert data[-1] == "data: [DONE]"
    chunks = [json.loads(event[6:]) for event in data[:-1]]

    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-2]["choices"][0]["delta"] == {}
    middle = chunks[1:-2]
    assert len(middle) == 4
    assert all(set(c["choices"][0]["delta"]) == {"content"} for c in middle)
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks[:-2])
    assert len({c["id"] for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_client_that_leaves_frees_its_blocks(stack: Stack, streaming: bool) -> None:
    """A closed connection, streaming or not, cancels on the TE."""
    request = body(MODEL, "Count for ever:", 1500)
    if not streaming:
        request = {**request, "stream": False, "stream_options": None}
    async with aiohttp.ClientSession() as session:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await stream(session, stack.url, request)

    stack.wait_idle(within_s=3)


async def test_sixty_four_streams_equal_each_alone(stack: Stack) -> None:
    """64 greedy streams at once have the text of each alone, token for token."""
    requests = [body(MODEL, f"{i} times {i + 1} equals", 6) for i in range(64)]
    together = await stream_all(stack.url, requests)
    async with aiohttp.ClientSession() as session:
        alone = [await stream(session, stack.url, request) for request in requests]

    assert [s.error for s in together] == [None] * 64
    assert [s.text for s in together] == [s.text for s in alone]
    assert all(s.usage["completion_tokens"] == 6 for s in together)
