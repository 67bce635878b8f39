"""Where requests go on the whole stack, and what it says about why."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from tests.system.conftest import MODEL
from tests.system.stack import Stack, body

pytestmark = [pytest.mark.system, pytest.mark.smollm2, pytest.mark.timeout(120)]
SHARED = "You are a patient assistant, and every answer of yours is short and true. " * 24


async def complete(session: aiohttp.ClientSession, stack: Stack, prompt: str, **more: Any) -> Any:
    """One completion, whole."""
    request = body(MODEL, prompt, **{"max_tokens": 8, **more})
    request |= {"stream": False}
    del request["stream_options"]
    async with session.post(f"{stack.url}/v1/completions", json=request) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def placed(stack: Stack, completion: Any) -> dict[str, Any]:
    """The one decision about a completion, once its end is known."""
    status, found = stack.get(f"/debug/requests/{completion['id']}/placement")
    assert status == 200, found
    [decision] = found["decisions"]
    return dict(decision)


async def test_a_conversation_returns_to_the_te_that_knows_it(stack: Stack) -> None:
    """Each turn goes where the one before it was computed, which was predicted and came true; the reasons are told."""
    async with aiohttp.ClientSession() as session:
        prompt, tes = f"A conversation of its own. {SHARED}", []
        for turn in range(3):
            completion = await complete(session, stack, prompt)
            await asyncio.sleep(0.6)  # until the pages are announced, and the end is known
            decision = placed(stack, completion)
            tes.append(decision["chosen"])
            chosen = next(c for c in decision["candidates"] if c["te"] == decision["chosen"])
            assert len(decision["candidates"]) == 2
            assert decision["answers"][-1] == [decision["chosen"], "accepted"]
            if turn:
                assert chosen["matched_pages"] > 10
                assert decision["actual"]["cached_tokens"] >= chosen["cached_tokens"]
            prompt += completion["choices"][0]["text"] + " And then?"
    assert len(set(tes)) == 1


async def test_a_shared_prefix_does_not_pile_up(stack: Stack) -> None:
    """Many prompts at once that begin alike are spread over the TEs, although one of them knew the beginning first."""
    async with aiohttp.ClientSession() as session:
        await complete(session, stack, SHARED)
        await asyncio.sleep(0.6)
        completions = await asyncio.gather(
            *(
                complete(session, stack, f"{SHARED} {n}. {n * 37}?", max_tokens=128)
                for n in range(16)
            )
        )
        await asyncio.sleep(0.6)
    tes = [placed(stack, completion)["chosen"] for completion in completions]
    assert sorted(tes.count(te) for te in set(tes))[:-1] >= [2]


async def test_a_placement_that_nobody_remembers_is_not_found(stack: Stack) -> None:
    """An unknown id is a 404 in the OpenAI shape."""
    status, found = stack.get("/debug/requests/cmpl-nobody/placement")
    assert status == 404
    assert json.loads(found)["error"]["param"] == "id"
