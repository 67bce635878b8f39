"""Ways of sending."""

from __future__ import annotations

import asyncio
from itertools import count

from deepflow.bench import load
from deepflow.bench.sample import Sample


class Server:
    """Answers after so long, and knows how many it had at once."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.num_now = 0
        self.num_most = 0
        self.prompts: list[str] = []

    async def send(self, prompt: str) -> Sample:
        """Take one prompt."""
        self.prompts.append(prompt)
        self.num_now += 1
        self.num_most = max(self.num_most, self.num_now)
        try:
            await asyncio.sleep(self._seconds)
        finally:
            self.num_now -= 1
        return Sample(sent_s=0.0, status=200, text=prompt)


async def test_a_closed_load_keeps_its_concurrency() -> None:
    """Every prompt is sent once, never more at a time than asked, and each end is told."""
    server, ended = Server(0.001), []
    prompts = [str(number) for number in range(20)]
    samples = await load.closed(server.send, prompts, 4, ended.append)
    assert server.num_most == 4
    assert sorted(sample.text for sample in samples) == sorted(prompts)
    assert ended == samples


async def test_a_scheduled_load_does_not_wait_for_answers() -> None:
    """Prompts go out at their times however many are under way, in order."""
    server = Server(0.2)
    samples = await load.scheduled(server.send, ["a", "b", "c"], [0.0, 0.001, 0.002])
    assert server.num_most == 3
    assert server.prompts == ["a", "b", "c"]
    assert len(samples) == 3


async def test_a_scheduled_load_can_be_bounded() -> None:
    """With a bound, late prompts wait for a place."""
    server = Server(0.001)
    await load.scheduled(server.send, ["a", "b", "c", "d"], [0.0] * 4, 2)
    assert server.num_most == 2
    assert len(server.prompts) == 4


async def test_a_window_ends_on_time_and_gives_up_what_is_under_way() -> None:
    """After the window nothing is under way, and what had not ended is not counted."""
    server, prompts = Server(60.0), map(str, count())
    async with asyncio.timeout(10):
        samples = await load.window(server.send, prompts, 0.05, rate=200.0)
    assert samples == []
    assert server.prompts
    assert server.num_now == 0


async def test_a_window_keeps_so_many_under_way() -> None:
    """With a concurrency the window always has so many under way."""
    server, prompts = Server(0.005), map(str, count())
    samples = await load.window(server.send, prompts, 0.1, concurrency=3)
    assert server.num_most == 3
    assert server.num_now == 0
    assert len(samples) >= 3
