"""Bodies of requests: everything served is bounded, everything known and not served is refused by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.openai.orders import (
    CHAT,
    COMPLETION,
    UNSERVED,
    ContextLengthExceeded,
    Order,
    check_model,
    max_tokens,
    read_chat,
    read_completion,
)
from services.gateway.openai.tokens import read_detokenize, read_tokenize
from shared.errors import InvalidRequest

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> Order:
    """A chat body with some fields."""
    return read_chat({"model": "m", "messages": HELLO, **fields})


def completion(**fields: Any) -> Order:
    """A completions body with some fields."""
    return read_completion({"model": "m", "prompt": "Hello", **fields})


BAD_SAMPLING: list[tuple[str, Any]] = [
    ("model", 7),
    ("model", ""),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),  # without stream
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("n", 1.0),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2**70),
    ("max_tokens", "10"),
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"99999999999999999999": 1}),
    ("logit_bias.5", {"5": 101}),
    ("logit_bias.5", {"5": None}),
    ("seed", "x"),
    ("seed", 2**64),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", ""),
    ("stop[1]", ["a", ""]),
    ("stop[0]", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", 5),
    ("stop_token_ids[0]", [-1]),
    ("ignore_eos", 0),
    ("service_tier", "scale"),
    ("priority", 1),
]
BAD_CHAT: list[tuple[str, Any]] = [
    ("messages", "Hello"),
    ("messages", []),
    ("messages[0]", ["Hello"]),
    ("messages[0].role", [{"content": "a"}]),
    ("messages[0].role", [{"role": "tool", "content": "a"}]),
    ("messages[0].content", [{"role": "user"}]),
    ("messages[0].content", [{"role": "user", "content": 7}]),
    ("messages[0].content[0].type", [{"role": "user", "content": [{"type": "image_url"}]}]),
    ("messages[0].content[0].text", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages[1].tool_calls", [*HELLO, {"role": "assistant", "tool_calls": [{}]}]),
    ("messages[0].name", [{"role": "user", "content": "a", "name": 1}]),
    ("top_logprobs", 21),
    ("top_logprobs", 3),  # without logprobs
    ("logprobs", 1),
    ("max_completion_tokens", 0),
    ("chat_template_kwargs", {"messages": []}),
]
BAD_COMPLETION: list[tuple[str, Any]] = [
    ("prompt", 7),
    ("prompt", []),
    ("prompt[1]", ["a", 1]),
    ("prompt[1]", [[1], []]),
    ("prompt", [1, "a"]),
    ("prompt", [-1]),
    ("prompt", [2**40]),
    ("prompt", ["a"] * 129),
    ("logprobs", 21),
    ("logprobs", True),
]


@pytest.mark.parametrize(("param", "value"), BAD_SAMPLING + BAD_CHAT)
def test_a_bad_chat_field_is_named(param: str, value: Any) -> None:
    """A wrong type or a value out of bounds is refused, and the error names the field."""
    with pytest.raises(InvalidRequest) as caught:
        chat(**{param.partition("[")[0].partition(".")[0]: value})
    assert caught.value.param == param


@pytest.mark.parametrize(("param", "value"), BAD_SAMPLING + BAD_COMPLETION)
def test_a_bad_completion_field_is_named(param: str, value: Any) -> None:
    """As for chats."""
    with pytest.raises(InvalidRequest) as caught:
        completion(**{param.partition("[")[0].partition(".")[0]: value})
    assert caught.value.param == param


@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    """A known field that would change the answer is never ignored; its null and harmless values are fine."""
    for read in (chat, completion):
        with pytest.raises(InvalidRequest) as caught:
            read(**{name: {"type": "json_schema"}})
        assert caught.value.param == name
        read(**{name: None})
        for harmless in UNSERVED[name]:
            read(**{name: harmless})


def test_null_means_default_everywhere() -> None:
    """Every optional field may be null."""
    assert chat(**dict.fromkeys(CHAT.keys() - {"model", "messages"})) == chat()
    assert completion(**dict.fromkeys(COMPLETION.keys() - {"model", "prompt"})) == completion()


def test_required_fields_are_named() -> None:
    """Without model, messages or prompt there is nothing to do."""
    for read, body, param in (
        (read_chat, {"messages": HELLO}, "model"),
        (read_chat, {"model": "m"}, "messages"),
        (read_completion, {"model": "m"}, "prompt"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            read(body)
        assert caught.value.param == param


def test_a_chat_is_read_as_sent() -> None:
    """Roles, parts and both names of the token limit end up where they belong."""
    order = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": "c", "name": "bot"},
        ],
        max_tokens=5,
        max_completion_tokens=7,
        logprobs=True,
        stop="x",
        top_k=-1,
        unknown_field={"a": 1},
    )
    assert order.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c", "name": "bot"},
    ]
    assert (order.max_tokens, order.logprobs, order.stop, order.top_k) == (7, 0, ["x"], 0)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_every_form_of_prompt_is_read(prompt: Any, read: Any) -> None:
    """A prompt is text or token ids, one or several."""
    assert completion(prompt=prompt).prompts == read


def test_what_the_vocabulary_decides() -> None:
    """Token ids anywhere in a body must be inside the model's vocabulary."""
    for name, order in (
        ("logit_bias", completion(logit_bias={"512": 1})),
        ("stop_token_ids", completion(stop_token_ids=[512])),
        ("prompt", completion(prompt=[[1], [512]])),
    ):
        with pytest.raises(InvalidRequest) as caught:
            check_model(order, 512)
        assert caught.value.param == name
        check_model(order, 513)


def test_the_context_bounds_prompt_and_output_together() -> None:
    """What does not fit is refused with both numbers; without a limit a chat gets the rest, a completion 16."""
    assert max_tokens(chat(), 100, 512) == 412
    assert max_tokens(completion(), 100, 512) == 16
    assert max_tokens(completion(), 510, 512) == 2
    assert max_tokens(completion(max_tokens=2), 510, 512) == 2
    for order, length in (
        (completion(max_tokens=3), 510),
        (chat(), 512),
        (chat(min_tokens=9), 505),
    ):
        with pytest.raises(ContextLengthExceeded) as caught:
            max_tokens(order, length, 512)
        assert "512" in caught.value.message
        assert str(length) in caught.value.message
    with pytest.raises(InvalidRequest):
        max_tokens(completion(), 0, 512)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, -(2**70), "", "text", "user", 1e308]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(body=st.dictionaries(st.sampled_from([*CHAT, *COMPLETION, *UNSERVED]), ANYTHING) | ANYTHING)
def test_any_body_is_read_or_refused(body: Any) -> None:
    """No JSON value makes a reader fail in any way but InvalidRequest."""
    for read in (read_chat, read_completion, read_tokenize, read_detokenize):
        for whole in (
            body,
            {"model": "m", "messages": HELLO, "prompt": "a"} | body
            if isinstance(body, dict)
            else 0,
        ):
            with contextlib.suppress(InvalidRequest):
                read(whole)


@given(name=st.sampled_from(sorted({*CHAT, *COMPLETION})), value=ANYTHING)
def test_any_value_of_any_field_is_read_or_named(name: str, value: Any) -> None:
    """One field of an otherwise good body is taken, or refused under its own name."""
    for read in (chat, completion):
        refused = None
        try:
            read(**{name: value})
        except InvalidRequest as error:
            refused = error.param
        assert refused is None or refused.startswith((name, "stream_options"))
