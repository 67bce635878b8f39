"""Parts of prompts that may be taken over from other prompts: how callers name them, and what the engine is told."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.openai.orders import read_chat, read_completion
from services.gateway.tokenizing import in_parts
from shared.errors import InvalidRequest
from shared.text.tokenizer import Tokenizer
from tests.gateway.peers import MODEL, Peers

PASSAGES = ["The first passage, of some words.", "Another one; it has its own words.", "A third."]


def part(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **fields}


@given(
    st.lists(st.sampled_from(PASSAGES), max_size=4),
    st.lists(st.text("ab \n", max_size=4), min_size=5, max_size=5),
)
def test_a_chunk_has_the_same_tokens_wherever_it_stands(
    tokenizer: Tokenizer, passages: list[str], between: list[str]
) -> None:
    """The text is the same as without chunks; each range holds the tokens of its chunk alone."""
    text = between[0] + "".join(map("".join, zip(passages, between[1:], strict=False)))
    ids, ranges = in_parts(tokenizer, text, passages, special=False)
    assert tokenizer.decode(ids) == text
    assert [ids[start:stop] for start, stop in ranges] == [tokenizer.encode(p) for p in passages]
    assert [end for one in ranges for end in one] == sorted(end for one in ranges for end in one)


def test_what_the_template_changed_is_no_chunk(tokenizer: Tokenizer) -> None:
    """A chunk that is not in the text is passed over; blanks around one do not matter."""
    text = "before " + PASSAGES[1] + " after"
    ids, ranges = in_parts(tokenizer, text, [PASSAGES[0], f" {PASSAGES[1]}\n", ""], special=False)
    [[start, stop]] = ranges
    assert tokenizer.decode(ids[start:stop]) == PASSAGES[1]
    assert tokenizer.decode(ids) == text


def test_without_chunks_nothing_changes(tokenizer: Tokenizer) -> None:
    """The tokens are those of the whole text."""
    text = " ".join(PASSAGES)
    assert in_parts(tokenizer, text, [], special=False) == (tokenizer.encode(text), [])


async def test_parts_of_a_chat(
    http: aiohttp.ClientSession, peers: Peers, tokenizer: Tokenizer
) -> None:
    """Parts with "cache": true reach the engine as ranges of tokens; others do not."""
    content = [part(PASSAGES[0], cache=True), part("And:"), part(PASSAGES[1], cache=True)]
    messages = [{"role": "user", "content": [*content, part("Which is longer?", cache=False)]}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 4}
    async with http.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200
    [request] = peers.requests
    texts = [tokenizer.decode(request.prompt[start:stop]) for start, stop in request.chunks]
    assert texts == PASSAGES[:2]
    plain = "<|im_start|>user\n" + "\n".join(one["text"] for one in messages[0]["content"])
    assert tokenizer.decode(request.prompt, skip_special=False).startswith(plain)


async def test_ranges_of_token_ids(http: aiohttp.ClientSession, peers: Peers) -> None:
    """A completion of token ids names its chunks itself."""
    body = {"model": MODEL, "prompt": list(range(3, 99)), "max_tokens": 4}
    async with http.post("/v1/completions", json=body | {"cache_chunks": [[10, 50]]}) as response:
        assert response.status == 200
    async with http.post("/v1/completions", json=body) as response:
        assert response.status == 200
    assert [request.chunks for request in peers.requests] == [[[10, 50]], []]


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ([3, 4, 5], [[0, 4]]),
        ([3, 4, 5], [[1, 1]]),
        ([3, 4, 5], [[2, 1]]),
        ([3, 4, 5], [[1, 3], [0, 1]]),
        ([3, 4, 5], [[0, 2], [1, 3]]),
        ([3, 4, 5], [[0]]),
        ([3, 4, 5], [0, 1]),
        ([3, 4, 5], [[-1, 2]]),
        ("text", [[0, 1]]),
        ([[3, 4, 5], [6, 7]], [[0, 1]]),
    ],
)
def test_ranges_that_are_none_are_refused(prompt: Any, chunks: Any) -> None:
    """Outside the prompt, empty, out of order, overlapping, no pairs, or of no single prompt of token ids."""
    with pytest.raises(InvalidRequest) as caught:
        read_completion({"model": MODEL, "prompt": prompt, "cache_chunks": chunks})
    assert (caught.value.param or "").startswith("cache_chunks")


def test_a_part_s_cache_is_a_boolean() -> None:
    """Anything else is refused by name."""
    messages = [{"role": "user", "content": [part("a", cache="yes")]}]
    with pytest.raises(InvalidRequest) as caught:
        read_chat({"model": MODEL, "messages": messages})
    assert caught.value.param == "messages[0].content[0].cache"
