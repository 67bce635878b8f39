"""Malformed requests: each is a 4xx in the OpenAI error shape, and the service still answers afterwards."""

from __future__ import annotations

import io
import json
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.system.conftest import MODEL
from tests.system.stack import Stack

pytestmark = [pytest.mark.system, pytest.mark.smollm2, pytest.mark.timeout(120)]
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


async def post(
    url: str, data: bytes, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, Any]:
    """POST bytes; the status and the decoded answer."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        session.post(
            url + path, data=data, headers={"Content-Type": "application/json", **headers}
        ) as response,
    ):
        text = await response.read()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text


def assert_refused(status: int, answer: Any, param: str | None = None) -> None:
    """The answer is a client error in OpenAI's shape; `param` is the field it must name."""
    assert 400 <= status < 500, (status, answer)
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "Traceback" not in error["message"]
    if param is not None:
        assert error["param"] == param, error


def with_field(name: str, value: Any) -> bytes:
    return json.dumps({**CHAT, name: value}).encode()


NESTED = b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HAND_WRITTEN: list[tuple[str, bytes, str | None]] = [
    ("empty", b"", None),
    ("not json", b"{", None),
    ("a list", b"[]", None),
    ("a number", b"1", None),
    ("null", b"null", None),
    ("deeply nested", NESTED, None),
    ("invalid utf-8", b'{"model":"\xff\xfe"}', None),
    ("lone surrogate", b'{"model":"\\ud800","messages":[{"role":"user","content":"x"}]}', None),
    ("nan", b'{"model":"x","temperature":NaN,"messages":[]}', None),
    (
        "infinity",
        with_field("temperature", 1).replace(b'"temperature": 1', b'"temperature": 1e999'),
        None,
    ),
    ("huge integer", with_field("max_tokens", 10**30), None),
    ("control characters", with_field("model", "a\u0000b\r\nPUB x"), None),
    ("wildcards", with_field("model", "*.>"), None),
    ("a long name", with_field("model", "m" * 10_000), None),
    ("no model", json.dumps({"messages": CHAT["messages"]}).encode(), "model"),
    ("no messages", json.dumps({"model": MODEL}).encode(), "messages"),
    ("empty messages", with_field("messages", []), "messages"),
    ("a role unknown", with_field("messages", [{"role": "king", "content": "x"}]), None),
    (
        "an image",
        with_field("messages", [{"role": "user", "content": [{"type": "image_url"}]}]),
        None,
    ),
    ("tools", with_field("tools", [{"type": "function"}]), "tools"),
    ("response_format", with_field("response_format", {"type": "json_object"}), "response_format"),
    ("max_tokens 0", with_field("max_tokens", 0), "max_tokens"),
    ("max_tokens past context", with_field("max_tokens", 10_000_000), None),
    ("max_tokens bool", with_field("max_tokens", True), "max_tokens"),
    ("temperature 2.1", with_field("temperature", 2.1), "temperature"),
    ("temperature text", with_field("temperature", "hot"), "temperature"),
    ("top_p 0", with_field("top_p", 0), "top_p"),
    ("top_p 1.01", with_field("top_p", 1.01), "top_p"),
    ("presence", with_field("presence_penalty", -2.5), "presence_penalty"),
    ("frequency", with_field("frequency_penalty", 3), "frequency_penalty"),
    ("n 0", with_field("n", 0), "n"),
    ("n 129", with_field("n", 129), "n"),
    ("five stops", with_field("stop", ["a", "b", "c", "d", "e"]), "stop"),
    (
        "top_logprobs",
        json.dumps({**CHAT, "logprobs": True, "top_logprobs": 21}).encode(),
        "top_logprobs",
    ),
    ("logit_bias key", with_field("logit_bias", {"999999999": 1}), "logit_bias"),
    ("logit_bias word", with_field("logit_bias", {"cat": 1}), "logit_bias"),
    ("stream text", with_field("stream", "yes"), "stream"),
    ("seed text", with_field("seed", "x"), "seed"),
    ("min_p", with_field("min_p", -1), "min_p"),
    ("top_k", with_field("top_k", -7), "top_k"),
    ("repetition_penalty 0", with_field("repetition_penalty", 0), "repetition_penalty"),
]


@pytest.mark.parametrize(
    ("data", "param"), [case[1:] for case in HAND_WRITTEN], ids=[c[0] for c in HAND_WRITTEN]
)
async def test_a_known_nuisance_is_refused(stack: Stack, data: bytes, param: str | None) -> None:
    """Each of these gets a 4xx that names the field at fault."""
    assert_refused(*await post(stack.url, data), param)


async def test_a_body_past_the_limit_is_413(stack: Stack) -> None:
    """An oversized body is refused as such."""
    async with (
        aiohttp.ClientSession() as session,
        # Like curl with a large body: ask before sending it, so that the refusal can be read.
        session.post(
            f"{stack.url}/v1/chat/completions",
            data=io.BytesIO(with_field("user", "x" * 20_000_000)),
            headers={"Content-Type": "application/json"},
            expect100=True,
        ) as response,
    ):
        assert response.status == 413
        assert_refused(response.status, await response.json())


async def test_a_wrong_content_type_is_refused(stack: Stack) -> None:
    """A form post, as a browser could send across sites, is refused."""
    status, answer = await post(stack.url, with_field("n", 1), **{"Content-Type": "text/plain"})

    assert_refused(status, answer)


async def test_a_foreign_host_is_refused(stack: Stack) -> None:
    """Without keys, a Host that is not loopback (DNS rebinding) is refused."""
    status, answer = await post(stack.url, with_field("n", 1), Host="evil.example")

    assert_refused(status, answer)


WRONG: dict[str, st.SearchStrategy[Any]] = {
    "model": st.none()
    | st.integers()
    | st.lists(st.text(), max_size=2)
    | st.text().filter(lambda t: t != MODEL),
    "messages": st.none()
    | st.text()
    | st.integers()
    | st.lists(st.none() | st.text() | st.integers(), min_size=1, max_size=3)
    | st.lists(
        st.dictionaries(
            st.sampled_from(["role", "content", "x"]), st.none() | st.integers(), max_size=2
        ),
        min_size=1,
        max_size=2,
    ),
    "max_tokens": st.integers(max_value=0)
    | st.integers(min_value=10**6)
    | st.text()
    | st.floats(0.1, 0.9),
    "temperature": st.floats(min_value=2.001, allow_infinity=False)
    | st.floats(max_value=-0.001, allow_infinity=False)
    | st.text()
    | st.lists(st.none(), max_size=1),
    "top_p": st.floats(max_value=0.0, allow_infinity=False)
    | st.floats(min_value=1.001, allow_infinity=False)
    | st.text(),
    "n": st.integers(max_value=0) | st.integers(min_value=129) | st.text() | st.booleans(),
    "stop": st.integers()
    | st.lists(st.integers(), min_size=1)
    | st.lists(st.text(min_size=1), min_size=5, max_size=9),
    "logit_bias": st.integers()
    | st.dictionaries(st.text("abc", min_size=1), st.integers(), min_size=1),
    "stream": st.integers() | st.text(),
    "seed": st.text() | st.floats(0.1, 0.9) | st.lists(st.none()),
    "presence_penalty": st.floats(min_value=2.001, allow_infinity=False) | st.text(),
    "tools": st.lists(st.dictionaries(st.text(), st.text(), max_size=1), min_size=1, max_size=2),
    "logprobs": st.integers() | st.text(),
    "stream_options": st.text() | st.lists(st.none()),
}


@settings(
    max_examples=200,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_generated_nonsense_is_refused(stack: Stack, data: st.DataObject) -> None:
    """Two hundred bodies with one field made wrong: each is refused, none is a 5xx or a hang."""
    import asyncio

    name = data.draw(st.sampled_from(sorted(WRONG)))
    value = data.draw(WRONG[name])
    status, answer = asyncio.run(post(stack.url, with_field(name, value)))

    assert_refused(status, answer)


async def test_the_service_still_answers(stack: Stack) -> None:
    """After all of that a good request is served."""
    status, answer = await post(stack.url, json.dumps(CHAT).encode())

    assert status == 200
    assert answer["usage"]["completion_tokens"] == 1
