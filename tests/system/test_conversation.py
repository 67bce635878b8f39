"""A conversation outlives the Task Executor that served it: on its host, and on another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deepflow import LLM
from deepflow.bench.conversation.hosts import Cluster
from tests.conftest import test_cache
from tests.system.conftest import MODEL
from tests.system.stack import body, stream

pytestmark = [pytest.mark.system, pytest.mark.apart, pytest.mark.smollm2, pytest.mark.timeout(180)]
NUM_TOKENS = 1500
OUTPUT = 12


def prompt(smollm2: Path) -> list[int]:
    """A long piece of prose, as token ids."""
    prose = Path(__file__).parents[2] / "deepflow/bench/prose/debian-handbook.txt"
    ids: list[int] = LLM(MODEL, cache_dir=test_cache(), threads=1).tokenizer.encode(
        prose.read_text()[:20_000]
    )
    return ids[:NUM_TOKENS]


def continuation(ids: list[int]) -> str:
    """What one engine, which never saw the prompt before, makes of it."""
    llm = LLM(MODEL, cache_dir=test_cache(), threads=1)
    (output,) = llm.generate([ids], max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    return output.text


@pytest.mark.parametrize("num_hosts", [1, 2])
async def test_a_conversation_goes_on_elsewhere(smollm2: Path, num_hosts: int) -> None:
    """Its TE is killed with all the blocks it held; the next turn finds them in the arena, its own host's or fetched
    from another's, and gives the tokens that computing them again would give."""
    first = prompt(smollm2)
    second = [*first, *first[:40]]
    settings = {"DEEPFLOW_ARENA_BYTES": str(256 << 20), "DEEPFLOW_THREADS": "1"}
    async with (
        Cluster.start(
            MODEL, test_cache(), settings, num_hosts=num_hosts, num_workers=3 - num_hosts
        ) as cluster,
        aiohttp.ClientSession() as session,
    ):
        opening = await stream(session, cluster.url, request(first))
        assert opening.error is None, cluster.logs()
        await cluster.wait_copied(NUM_TOKENS // 16)
        await cluster.kill_server()
        seen = await stream(session, cluster.url, request(second))

        assert seen.error is None, cluster.logs()
        assert seen.usage["prompt_tokens_details"]["cached_tokens"] >= NUM_TOKENS // 16 * 16 - 16, (
            cluster.logs()
        )
        ledgers = await cluster.ledgers()
    assert seen.text == continuation(second)
    for ledger in ledgers:
        states = ("live", "cached", "leased", "moving", "free")
        assert ledger["total"] == sum(ledger[state] for state in states), ledger


def request(ids: list[int]) -> dict[str, Any]:
    """Continue these tokens."""
    return {**body(MODEL, "", OUTPUT), "prompt": ids}
