"""Batches through the unmodified `openai` client, with the JE and the gateway killed in the middle of one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter

import openai
import pytest
from openai.types import Batch

from tests.system.conftest import MODEL
from tests.system.stack import Stack

pytestmark = [pytest.mark.system, pytest.mark.smollm2, pytest.mark.timeout(150)]
NUM_LINES = 96
NUM_TOKENS = 48
FINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
async def client(stack: Stack) -> openai.AsyncOpenAI:
    """A client that tries again while a killed gateway starts."""
    return openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=8)


def jsonl(num_lines: int, **more: object) -> bytes:
    """An input of so many completions."""
    body = {"model": MODEL, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, **more}
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {**body, "prompt": f"Story number {number} begins with"},
        }
        for number in range(num_lines)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


async def begin(client: openai.AsyncOpenAI, contents: bytes) -> Batch:
    """A new batch of that input."""
    file = await client.files.create(file=("in.jsonl", contents), purpose="batch")
    assert (file.bytes, file.status) == (len(contents), "processed")
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )


async def until_done(client: openai.AsyncOpenAI, id_: str, num_done: int = 1 << 30) -> Batch:
    """The batch once so many lines are done, or it is over."""
    give_up = time.monotonic() + 100
    impatient = client.with_options(max_retries=0)
    while True:
        try:
            batch = await impatient.batches.retrieve(id_)
        except (openai.APIConnectionError, openai.InternalServerError):
            assert time.monotonic() < give_up
            await asyncio.sleep(0.1)
            continue
        assert batch.request_counts is not None
        if batch.status in FINAL or batch.request_counts.completed >= num_done:
            return batch
        assert time.monotonic() < give_up, batch
        await asyncio.sleep(0.1)


def written(stack: Stack, batch: str) -> set[str]:
    """The keys of the lines whose outcomes are on disk."""
    folder = stack.home / "files" / "batches" / batch
    records = b"".join(path.read_bytes() for path in sorted(folder.glob("*"))).splitlines()
    return {f"{batch}-{record.split()[0].decode()}" for record in records}


async def test_a_batch_survives_the_death_of_je_and_gateway(
    stack: Stack, client: openai.AsyncOpenAI
) -> None:
    """kill -9 of the JE, then of the gateway: every line is answered once, in order, as alone; what was written down
    before a blow is not run again."""
    stack.wait_tes()
    async with client:
        blows = [
            (await asyncio.to_thread(stack.service_pid, kind), num_done)
            for kind, num_done in (("scheduler", 6), ("gateway", 20))
        ]
        batch = await begin(client, jsonl(NUM_LINES))
        finished: set[str] = set()
        for pid, num_done in blows:
            seen = await until_done(client, batch.id, num_done)
            assert seen.status == "in_progress", "it was over before the blow"
            finished |= written(stack, batch.id)
            os.kill(pid, signal.SIGKILL)
        batch = await until_done(client, batch.id)
        assert batch.status == "completed", stack.logs()
        assert batch.request_counts is not None
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (NUM_LINES, NUM_LINES, 0)
        assert batch.usage is not None
        assert batch.usage.output_tokens == NUM_LINES * NUM_TOKENS
        assert batch.output_file_id is not None
        assert batch.error_file_id is None
        content = await client.files.content(batch.output_file_id)
        lines = [json.loads(line) for line in content.text.splitlines()]
        assert [line["custom_id"] for line in lines] == [f"line-{n}" for n in range(NUM_LINES)]
        alone = await client.completions.create(
            model=MODEL, prompt="Story number 7 begins with", max_tokens=NUM_TOKENS, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert lines[7]["response"]["body"]["choices"][0]["text"] == alone.choices[0].text
        listed = await client.batches.list(limit=1)
        assert [one.id for one in listed.data] == [batch.id]
    runs: Counter[str] = Counter()
    for log in (stack.home / "logs").glob("gateway*.log"):
        for text in log.read_text(errors="replace").splitlines():
            if '"call_ended"' in text and '"length"' in text:
                runs[json.loads(text)["request_id"]] += 1
    assert len(finished) >= 20
    assert {runs[key] for key in finished} == {1}
    stack.wait_tes()
    stack.wait_idle()


async def test_a_batch_can_be_cancelled(stack: Stack, client: openai.AsyncOpenAI) -> None:
    """A cancelled batch ends with what is done by then, and its engines are idle soon."""
    stack.wait_tes()
    async with client:
        batch = await begin(client, jsonl(64, max_tokens=96))
        await client.batches.cancel(batch.id)
        batch = await until_done(client, batch.id)
        assert batch.status == "cancelled"
        assert batch.cancelled_at is not None


async def test_an_input_that_is_wrong_is_refused(client: openai.AsyncOpenAI) -> None:
    """A line that is no JSON fails the batch, and is named."""
    async with client:
        batch = await begin(client, jsonl(2) + b"{no\n")
        batch = await until_done(client, batch.id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [(e.line, e.code) for e in batch.errors.data or []] == [(3, "invalid_json_line")]
