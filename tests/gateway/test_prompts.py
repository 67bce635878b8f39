"""The tokenizer pool: right answers, and processes that crash or hang cost one job only."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.gateway.prompts import Prompts
from shared import catalog, log, subjects
from shared.blockhash import chain
from shared.errors import DeadlineExceeded, Internal, InvalidRequest
from shared.text.tokenizer import Tokenizer
from tests.gateway.peers import MODEL

ROOT = b"r" * 16


@pytest.fixture
def folder(cache: Path) -> str:
    """The tiny model's folder."""
    return str(catalog.models_dir(cache) / subjects.encode(MODEL))


@pytest.fixture
async def pool() -> AsyncIterator[Prompts]:
    """A pool of one process with a short time limit, in a TaskGroup of its own."""
    started: asyncio.Future[Prompts] = asyncio.Future()
    stop = asyncio.Event()

    async def live() -> None:
        made = Prompts(1, 2.0, log.get())
        async with asyncio.TaskGroup() as tasks:
            await made.start(tasks)
            keepers = list(tasks._tasks)
            started.set_result(made)
            await stop.wait()
            for task in keepers:
                task.cancel()

    living = asyncio.create_task(live())
    made = await started
    pids = made.pids()
    yield made
    stop.set()
    await living
    for pid in [*pids, *made.pids()]:
        with pytest.raises(ProcessLookupError):  # none stays behind
            os.kill(pid, 0)


async def test_tokens_and_hashes(pool: Prompts, folder: str, tokenizer: Tokenizer) -> None:
    """Text, token ids and chats come back as ids with the hashes of their full pages."""
    text = "the quick brown fox jumps over the lazy dog " * 3
    ids = tokenizer.encode(text)
    made = await pool.texts(folder, "1", [text, [1, 2]], special=False, root=ROOT, page=16)
    assert [prompt.ids for prompt in made] == [ids, [1, 2]]
    assert made[0].hashes == chain(ROOT, ids, 16)
    assert made[1].hashes == []
    chat = await pool.chat(
        folder, "1", [{"role": "user", "content": "Hi"}], {"add_generation_prompt": False},
        special=False, root=ROOT, page=16,
    )  # fmt: skip
    assert tokenizer.decode(chat.ids, skip_special=False) == "<|im_start|>user\nHi<|im_end|>\n"
    assert await pool.decode(folder, "1", ids) == text


async def test_what_a_template_refuses(pool: Prompts, folder: str) -> None:
    """A template's failure is the caller's error, and the process lives on."""
    [pid] = pool.pids()
    with pytest.raises(InvalidRequest) as caught:
        await pool.chat(folder, "1", [{}], {}, special=False, root=b"", page=0)
    assert caught.value.param == "messages"
    assert pool.pids() == [pid]


async def test_a_dead_process_costs_no_job(pool: Prompts, folder: str) -> None:
    """A process that died while idle, or with a job it has not answered, is replaced, and the job is tried again."""
    for idle in (True, False):
        [pid] = pool.pids()
        os.kill(pid, signal.SIGKILL if idle else signal.SIGSTOP)
        job = asyncio.create_task(pool.texts(folder, "1", ["a"], special=False, root=b"", page=0))
        await asyncio.sleep(0.05)
        if not idle:
            os.kill(pid, signal.SIGKILL)
        [prompt] = await job
        assert prompt.ids
        assert pool.pids() != [pid]


async def test_a_job_that_kills_processes_fails(pool: Prompts, folder: str) -> None:
    """A second death with the same job fails it, and the jobs behind it are served."""
    job = asyncio.create_task(pool.texts(folder, "1", ["a"], special=False, root=b"", page=0))
    behind = asyncio.create_task(pool.texts(folder, "1", ["b"], special=False, root=b"", page=0))
    killed: list[int] = []
    while len(killed) < 2:
        for pid in pool.pids():
            if pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        await asyncio.sleep(0.001)
    with pytest.raises(Internal):
        await job
    assert (await behind)[0].ids


async def test_a_model_that_kills_processes_does_not_block_the_others(
    pool: Prompts, folder: str, tmp_path: Path
) -> None:
    """What cannot be loaded ahead is left to the jobs that name it."""
    os.mkfifo(tmp_path / "tokenizer.json")  # reading it never ends
    [pid] = pool.pids()
    pool.announce(str(tmp_path), "1")
    await asyncio.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    [prompt] = await pool.texts(folder, "1", ["a"], special=False, root=b"", page=0)
    assert prompt.ids


async def test_a_stuck_process_is_replaced(pool: Prompts, folder: str) -> None:
    """A job past the time limit fails with its own error; waiting ones are served by the replacement."""
    [pid] = pool.pids()
    os.kill(pid, signal.SIGSTOP)
    stuck = asyncio.create_task(pool.texts(folder, "1", ["a"], special=False, root=b"", page=0))
    await asyncio.sleep(0.1)
    waiting = asyncio.create_task(pool.texts(folder, "1", ["b"], special=False, root=b"", page=0))
    with pytest.raises(DeadlineExceeded):
        await stuck
    assert (await waiting)[0].ids


async def test_a_client_that_leaves_disturbs_nobody(pool: Prompts, folder: str) -> None:
    """A job whose caller is cancelled does not mix up the answers of the others."""
    first = asyncio.create_task(pool.texts(folder, "1", ["a"], special=False, root=b"", page=0))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    [prompt] = await pool.texts(folder, "1", [[7, 8]], special=False, root=b"", page=0)
    assert prompt.ids == [7, 8]
