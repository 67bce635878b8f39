"""Ways of sending prompts: so many at once, at given times, or for a given time.

It must not know what a prompt is, nor what comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final, TypeAlias, TypeVar

from deepflow.bench.sample import Sample

P = TypeVar("P")
Send: TypeAlias = Callable[[P], Awaitable[Sample]]
_LATE_S: Final = 0.05  # how far behind its schedule a window's sender may fall before it skips


async def closed(
    send: Send[P],
    prompts: Sequence[P],
    concurrency: int,
    done: Callable[[Sample], None] = lambda _: None,
) -> list[Sample]:
    """Every prompt once, `concurrency` under way at a time: the next is sent when one is over. In order of end."""
    samples: list[Sample] = []
    left = iter(prompts)

    async def sender() -> None:
        for prompt in left:
            sample = await send(prompt)
            samples.append(sample)
            done(sample)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(concurrency, len(prompts))):
            tasks.create_task(sender())
    return samples


async def scheduled(
    send: Send[P],
    prompts: Sequence[P],
    times_s: Sequence[float],
    concurrency: int | None = None,
    done: Callable[[Sample], None] = lambda _: None,
) -> list[Sample]:
    """Every prompt at its time after now, however many are under way, or at most `concurrency`. In order of end."""
    samples: list[Sample] = []
    gate = asyncio.Semaphore(concurrency) if concurrency else contextlib.nullcontext()
    loop = asyncio.get_running_loop()
    start_s = loop.time()

    async def sender(prompt: P) -> None:
        async with gate:
            sample = await send(prompt)
        samples.append(sample)
        done(sample)

    async with asyncio.TaskGroup() as tasks:
        for prompt, time_s in zip(prompts, times_s, strict=True):
            await asyncio.sleep(start_s + time_s - loop.time())
            tasks.create_task(sender(prompt))
    return samples


async def window(
    send: Send[P], prompts: Iterator[P], seconds: float, *, rate: float = 0.0, concurrency: int = 0
) -> list[Sample]:
    """Load for so many seconds, evenly at `rate` per second or with `concurrency` under way; what is over by then.

    The rest is given up by closing its connections.
    """
    samples: list[Sample] = []
    loop = asyncio.get_running_loop()
    end_s = loop.time() + seconds

    async def sender() -> None:
        samples.append(await send(next(prompts)))

    async def keep_sending() -> None:
        while True:
            await sender()

    async with asyncio.TaskGroup() as tasks:
        under_way: set[asyncio.Task[None]] = set()
        for _ in range(concurrency):
            under_way.add(tasks.create_task(keep_sending()))
        due_s = loop.time()
        while loop.time() < end_s:
            if not rate:
                await asyncio.sleep(end_s - loop.time())
                continue
            due_s = max(due_s + 1 / rate, loop.time() - _LATE_S)
            await asyncio.sleep(due_s - loop.time())
            task = tasks.create_task(sender())
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        for task in under_way:
            task.cancel()
    return samples
